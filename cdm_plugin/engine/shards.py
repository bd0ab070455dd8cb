"""Weights that DeepSpeed shares between processes: which piece of each is this rank's.

DeepSpeed keeps a trained network's float32 weights in flat tensors, of which a rank owns a part; what a weight's own
piece in them is differs between its stages. Everything else (fake merge, moving average, checkpoints) works on the
pieces by the weight's name, and so knows no stage.
"""
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cdm_plugin.engine.shard_files import Span


@dataclass(frozen=True)
class Piece(Span):
    """One rank's part of one weight, and where DeepSpeed keeps it.

    Attributes:
        group (int): Flat tensor that it lies in.
        offset (int): Where it starts there.
    """
    group: int
    offset: int

    def of(self, flats: list[Tensor]) -> Tensor:
        """The piece itself, sharing memory with the flat tensor that it lies in."""
        return flats[self.group].detach().narrow(0, self.offset, self.numel)


class Shards:
    """This rank's pieces of an engine's float32 weights, and of its optimizer's state.

    The one place that knows how DeepSpeed's ZeRO stages lay them out.

    Args:
        engine (DeepSpeedEngine): With an optimizer, at ZeRO stage 1, 2 or 3.
    """

    def __init__(self, engine: Any) -> None:
        self.optimizer, self.stage = engine.optimizer, engine.zero_optimization_stage()
        named = [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]
        self.shapes = {name: tuple(getattr(p, 'ds_shape', p.shape)) for name, p in named}
        found = ((name, self._partitioned(p) if self.stage == 3 else self._grouped(p)) for name, p in named)
        self.pieces: dict[str, Piece] = {name: piece for name, piece in found if piece is not None}

    @staticmethod
    def _grouped(parameter: Any) -> Piece | None:
        """Stages 1 and 2: every rank owns a part of a group's weights laid end to end."""
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        inside, flat = mapping.lp_fragment_address, mapping.hp_fragment_address
        return Piece(inside.start, inside.numel, mapping.param_group_index, flat.start)

    def _partitioned(self, parameter: Any) -> Piece | None:
        """Stage 3: every rank owns a part of each weight, padded at the end of the last one."""
        group, offset, size = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
        start = size * self.optimizer._get_param_partition_rank(parameter)
        numel = min(size, parameter.ds_numel - start)
        return Piece(start, numel, group, offset) if numel > 0 else None

    @property
    def flats(self) -> list[Tensor]:
        """The flat tensors of float32 weights, one a group."""
        optimizer = self.optimizer
        return optimizer.fp32_partitioned_groups_flat if self.stage == 3 else optimizer.single_partition_of_fp32_groups

    @property
    def weights(self) -> dict[str, Tensor]:
        """This rank's pieces by name, flat; after a change in place, call `refresh`."""
        return {name: piece.of(self.flats) for name, piece in self.pieces.items()}

    @torch.no_grad()
    def refresh(self) -> None:
        """Brings changed pieces into the weights that the network computes with. A collective: every rank must call
        it."""
        optimizer = self.optimizer
        if self.stage < 3:
            optimizer.update_lp_params()
            return
        optimizer._partition_all_parameters()  # what is still gathered would keep the old values
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
        optimizer.invalidate_secondary_tensor()

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Takes over pieces by name."""
        for name, own in self.weights.items():
            own.copy_(weights[name])
        self.refresh()

    # The state of the optimizer. A state is sliced like the weights (Adam's moments) or belongs to a group (its step).

    @property
    def _inner(self) -> torch.optim.Optimizer:
        return self.optimizer.optimizer

    def optimizer_state(self) -> dict[str, Any]:
        """This rank's part of the optimizer's state, by weight."""
        sliced: dict[str, dict[str, Tensor]] = {}
        single: dict[str, dict[str, Any]] = {}
        for name, piece in self.pieces.items():
            flat = self.flats[piece.group]
            for key, value in self._inner.state.get(flat, {}).items():
                if isinstance(value, Tensor) and value.shape == flat.shape:
                    sliced.setdefault(key, {})[name] = value.narrow(0, piece.offset, piece.numel)
                else:
                    single.setdefault(key, {})[name] = value
        groups = [{k: v for k, v in group.items() if k != 'params'} for group in self._inner.param_groups]
        return dict(sliced=sliced, single=single, groups=groups)

    @torch.no_grad()
    def load_optimizer_state(self, state: Mapping[str, Any]) -> None:
        """Takes over what `optimizer_state` returned, cut to this rank's pieces."""
        self._inner.state.clear()
        for name, piece in self.pieces.items():
            flat = self.flats[piece.group]
            own = self._inner.state[flat]
            for key, values in state['sliced'].items():
                if key not in own:
                    own[key] = torch.zeros_like(flat, requires_grad=False)
                own[key].narrow(0, piece.offset, piece.numel).copy_(values[name])
            for key, values in state['single'].items():
                own.setdefault(key, values[name].clone() if isinstance(values[name], Tensor) else values[name])
        for group, saved in zip(self._inner.param_groups, state['groups']):
            group.update(saved)
