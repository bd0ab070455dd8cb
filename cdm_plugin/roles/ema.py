"""Moving average of the student's weights."""
import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from cdm_plugin.arguments import Decay, checked
from cdm_plugin.flow import full_precision
from cdm_plugin.roles.weights import first_not_finite, full_weights, lerp_all, refresh, unwrap


class StudentEMA:
    """Exponential moving average in float32 (a decay of 0.999 is lost in bfloat16 rounding), with the warm-up
    decay = min((1 + k) / (10 + k), max_decay) after the k-th student step.

    Of a sharded network every rank averages its own pieces of the float32 weights.

    Args:
        network (nn.Module): The student's network; its trainable parameters are averaged.
        max_decay (float): Upper limit of the decay, in [0, 1). Default 0.999.
    """

    @checked
    def __init__(self, network: nn.Module, max_decay: Decay = 0.999) -> None:
        self.network, self.max_decay = network, max_decay
        self._steps: int | Tensor = 0
        self.weights = {name: full_precision(p.detach()).clone() for name, p in self._parameters()}

    def _parameters(self) -> list[tuple[str, Tensor]]:
        trained = {name for name, p in unwrap(self.network).named_parameters() if p.requires_grad}
        return [(name, w) for name, w in full_weights(self.network).items() if name in trained]

    @property
    def steps(self) -> int:
        """Student steps in the average; waits for the device if only it knows how many were taken."""
        return int(self._steps)

    @steps.setter
    def steps(self, steps: int) -> None:
        self._steps = steps

    @torch.no_grad()
    def update(self, taken: bool | Tensor = True) -> None:
        """Takes one student step into the average.

        Args:
            taken (bool or Tensor): Whether there was one: True, or a tensor of 1 or 0 where only the device knows.
                Default True.
        """
        if isinstance(taken, Tensor):
            taken = taken.double()  # as Python counts and divides
        self._steps = self._steps + taken
        ratio = (1 + self._steps) / (10 + self._steps)
        decay = ratio.clamp(max=self.max_decay) if isinstance(ratio, Tensor) else min(ratio, self.max_decay)
        pairs = [(self.weights[name], p.detach().to(self.weights[name])) for name, p in self._parameters()]
        if pairs:  # a rank may own no piece
            lerp_all([w for w, _ in pairs], [p for _, p in pairs], (1 - decay) * taken)

    @torch.no_grad()
    def reset(self) -> None:
        """Starts again from the student's present weights."""
        self.steps = 0
        for name, p in self._parameters():
            self.weights[name].copy_(p)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The student's network carries the averaged weights inside, its own again after.

        The weights of a whole network change places, which takes no memory; pieces of a sharded one are copied."""
        whole = getattr(self.network, 'weight_shards', None) is None
        own = {name: p.detach() if whole else p.detach().clone() for name, p in self._parameters()}
        put = self._exchange if whole else self._copy
        put(self.weights)
        try:
            yield
        finally:
            put(own)

    def _exchange(self, weights: dict[str, Tensor]) -> None:
        for name, p in self._parameters():
            p.data = weights[name].to(p.data)  # the tensor itself if device and dtype agree

    @torch.no_grad()
    def _copy(self, weights: dict[str, Tensor]) -> None:
        for name, p in self._parameters():
            p.copy_(weights[name])
        refresh(self.network)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain data."""
        return dict(steps=self.steps, weights={name: w.cpu() for name, w in self.weights.items()})

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
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


def check_finite(method: Any, ema: bool, source: str) -> None:
    """Refuses weights of a method's main role that are not finite, before they draw or are written.

    Args:
        method (DiffusionModel): The method.
        ema (bool): Whether the average is what is used (the role's own weights if there is none).
        source (str): Where the weights come from, for the message.

    Raises:
        ValueError: If they are not finite.
    """
    if ema and method.student_ema is not None:
        role, weights = 'student_ema', method.student_ema.weights
    else:
        role, weights = method.main_role, full_weights(getattr(method, method.main_role))
    if (name := first_not_finite(weights)) is not None:
        raise ValueError(f'{source} has weights that are not finite, {role}.{name} for example: take an earlier '
                         'checkpoint, or one of another run')
