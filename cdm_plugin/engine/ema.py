"""Moving average of the student's weights."""
import contextlib
from typing import Any, Dict, Iterator, List, Tuple

import torch
from torch import Tensor, nn

from cdm_plugin.flow import full_precision
from cdm_plugin.networks import full_weights, refresh, unwrap


class StudentEMA:
    """Exponential moving average in float32 (a decay of 0.999 is lost in bfloat16 rounding), with the warm-up
    decay = min((1 + k) / (10 + k), max_decay) after the k-th student step.

    Of a sharded network every rank averages its own pieces of the float32 weights.

    Args:
        network (nn.Module): The student's network; its trainable parameters are averaged.
        max_decay (float): Upper limit of the decay, in [0, 1). Default 0.999.
    """

    def __init__(self, network: nn.Module, max_decay: float = 0.999) -> None:
        if not 0 <= max_decay < 1:
            raise ValueError(f'CDMHook.ema_decay must lie in [0, 1), but is {max_decay}')
        self.network, self.max_decay, self.steps = network, max_decay, 0
        self.weights = {name: full_precision(p.detach()).clone() for name, p in self._parameters()}

    def _parameters(self) -> List[Tuple[str, Tensor]]:
        trained = {name for name, p in unwrap(self.network).named_parameters() if p.requires_grad}
        return [(name, w) for name, w in full_weights(self.network).items() if name in trained]

    @torch.no_grad()
    def update(self) -> None:
        """Takes one student step into the average."""
        self.steps += 1
        decay = min((1 + self.steps) / (10 + self.steps), self.max_decay)
        pairs = [(self.weights[name], p.detach().to(self.weights[name])) for name, p in self._parameters()]
        if pairs:  # a rank may own no piece
            torch._foreach_lerp_([w for w, _ in pairs], [p for _, p in pairs], 1 - decay)

    @torch.no_grad()
    def reset(self) -> None:
        """Starts again from the student's present weights."""
        self.steps = 0
        for name, p in self._parameters():
            self.weights[name].copy_(p)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The student's network carries the averaged weights inside, its own again after."""
        with torch.no_grad():
            own = {name: p.detach().clone() for name, p in self._parameters()}
            self._write(self.weights)
        try:
            yield
        finally:
            self._write(own)

    @torch.no_grad()
    def _write(self, weights: Dict[str, Tensor]) -> None:
        for name, p in self._parameters():
            p.copy_(weights[name])
        refresh(self.network)

    def state_dict(self) -> Dict[str, Any]:
        """Tensors and plain data."""
        return dict(steps=self.steps, weights={name: w.cpu() for name, w in self.weights.items()})

    @torch.no_grad()
    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Takes over a saved average.

        Raises:
            ValueError: If its parameters are not the student's.
        """
        shapes, own = ({k: tuple(w.shape) for k, w in ws.items()} for ws in (state['weights'], self.weights))
        if shapes != own:
            differ = sorted(k for k in {**shapes, **own} if shapes.get(k) != own.get(k))[:3]
            raise ValueError(f'the checkpoint\'s EMA has other parameters than the student, for example {differ}: it '
                             'comes from another model.backbone')
        self.steps = int(state['steps'])
        for name, w in state['weights'].items():
            self.weights[name].copy_(w)
