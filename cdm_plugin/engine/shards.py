"""Weights that several processes share: which piece of each is this rank's, and checkpoints made of such pieces.

DeepSpeed keeps a trained network's float32 weights in flat tensors, of which a rank owns a part; what a weight's own
piece in them is differs between its stages. Everything else (fake merge, moving average, checkpoints) works on the
pieces by the weight's name, and so knows no stage. A checkpoint written in this way is a folder of plain tensors,
without a pickled object; it can be put together again without DeepSpeed.
"""
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional, Tuple

import torch
from torch import Tensor

COMMON_FILE, RANK_FILE = 'common.pth', 'rank_{}.pth'
FORMAT = 'cdm_plugin shards 1'


@dataclass(frozen=True)
class Piece:
    """One rank's part of one weight.

    Attributes:
        start (int): Where it starts in the flattened weight.
        numel (int): Its number of elements.
        group (int): Flat tensor that it lies in.
        offset (int): Where it starts there.
    """
    start: int
    numel: int
    group: int
    offset: int

    def of(self, flats: List[Tensor]) -> Tensor:
        """The piece itself, sharing memory with the flat tensor that it lies in."""
        return flats[self.group].detach().narrow(0, self.offset, self.numel)

    def cut(self, whole: Tensor) -> Tensor:
        """The same part of a whole tensor."""
        return whole.flatten()[self.start:self.start + self.numel]


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
        self.pieces: Dict[str, Piece] = {name: piece for name, piece in found if piece is not None}

    @staticmethod
    def _grouped(parameter: Tensor) -> Optional[Piece]:
        """Stages 1 and 2: every rank owns a part of a group's weights laid end to end."""
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        inside, flat = mapping.lp_fragment_address, mapping.hp_fragment_address
        return Piece(inside.start, inside.numel, mapping.param_group_index, flat.start)

    def _partitioned(self, parameter: Tensor) -> Optional[Piece]:
        """Stage 3: every rank owns a part of each weight, padded at the end of the last one."""
        group, offset, size = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
        start = size * self.optimizer._get_param_partition_rank(parameter)
        numel = min(size, parameter.ds_numel - start)
        return Piece(start, numel, group, offset) if numel > 0 else None

    @property
    def flats(self) -> List[Tensor]:
        """The flat tensors of float32 weights, one a group."""
        optimizer = self.optimizer
        return optimizer.fp32_partitioned_groups_flat if self.stage == 3 else optimizer.single_partition_of_fp32_groups

    @property
    def weights(self) -> Dict[str, Tensor]:
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

    def optimizer_state(self) -> Dict[str, Any]:
        """This rank's part of the optimizer's state, by weight."""
        sliced: Dict[str, Dict[str, Tensor]] = {}
        single: Dict[str, Dict[str, Any]] = {}
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


# Checkpoints: one file of what is equal on every rank, and one file a rank with its pieces.

def is_sharded(path: Any) -> bool:
    """Whether a path is a checkpoint made of shards."""
    return Path(path, COMMON_FILE).is_file()


def layout_of(shards: Mapping[str, Shards]) -> Dict[str, Dict[str, Tuple[int, int]]]:
    """Start and length of this rank's pieces, by role and name."""
    return {role: {name: (piece.start, piece.numel) for name, piece in own.pieces.items()}
            for role, own in shards.items()}


def _read(folder: Any, file: str, lazy: bool = False) -> Dict[str, Any]:
    path = Path(folder, file)
    if not path.is_file():
        raise FileNotFoundError(f'the checkpoint {str(folder)!r} is incomplete, it has no {file}: copy it again, or '
                                'resume from an earlier one')
    try:
        return torch.load(path, map_location='cpu', weights_only=True, mmap=lazy)
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(f'the checkpoint {str(folder)!r} is damaged, {file} cannot be read: copy it again, or resume '
                         f'from an earlier one ({str(error).splitlines()[0]})') from None


def read_common(folder: Any) -> Dict[str, Any]:
    """What is equal on every rank.

    Raises:
        ValueError: If the folder is damaged or of another format.
    """
    common = _read(folder, COMMON_FILE)
    if common.get('format') != FORMAT:
        raise ValueError(f'the checkpoint {str(folder)!r} has the format {common.get("format")!r}, but this version '
                         f'reads {FORMAT!r}')
    return common


class Joined:
    """All ranks' pieces of a checkpoint, to be put together one weight at a time (the files stay on the disk)."""

    def __init__(self, folder: Any, common: Mapping[str, Any]) -> None:
        self.shapes = common['shapes']
        self.ranks = [_read(folder, RANK_FILE.format(rank), lazy=True) for rank in range(common['world_size'])]

    def whole(self, role: str, name: str, values: List[Mapping[str, Tensor]]) -> Tensor:
        """One weight (or a tensor that is sliced like it) in its shape, from each rank's values by name."""
        result: Optional[Tensor] = None
        for rank, of_rank in zip(self.ranks, values):
            place = rank['layout'][role].get(name)
            if place is None or name not in of_rank:
                continue
            if result is None:
                result = of_rank[name].new_zeros(self.shapes[role][name]).flatten()
            result[place[0]:place[0] + place[1]] = of_rank[name]
        if result is None:
            raise ValueError(f'the checkpoint has no piece of {role}.{name}: it is incomplete')
        return result.view(self.shapes[role][name])

    def weights(self, role: str) -> Iterator[Tuple[str, Tensor]]:
        """A role's whole weights."""
        values = [rank['weights'][role] for rank in self.ranks]
        return ((name, self.whole(role, name, values)) for name in self.shapes[role])

    def ema(self) -> Optional[Dict[str, Any]]:
        """The student's whole moving average, as `StudentEMA.state_dict` has it of a network that is not sharded."""
        if 'student_ema' not in self.ranks[0]:
            return None
        values = [rank['student_ema']['weights'] for rank in self.ranks]
        return dict(steps=self.ranks[0]['student_ema']['steps'],
                    weights={name: self.whole('student', name, values) for name in self.shapes['student']})


def read_whole(folder: Any) -> Dict[str, Any]:
    """A checkpoint of shards as one of whole weights, such as a run in one process writes (without optimizers)."""
    common = read_common(folder)
    joined = Joined(folder, common)
    state = dict(common['state_dict'])
    for role in joined.shapes:
        state.update({f'{role}.{name}': weight for name, weight in joined.weights(role)})
    result = {k: v for k, v in common.items() if k not in ('format', 'world_size', 'shapes', 'state_dict')}
    ema = joined.ema()
    return dict(result, state_dict=state, **({} if ema is None else dict(student_ema=ema)))


def read_pieces(folder: Any, common: Mapping[str, Any], rank: int, world_size: int,
                shards: Mapping[str, Shards]) -> Dict[str, Any]:
    """This rank's pieces: its own file if it holds just these, otherwise cut from the joined files (the checkpoint
    was written by another number of processes, or at another stage)."""
    _check_names(folder, common, shards)
    layout = layout_of(shards)
    if common['world_size'] == world_size:
        own = _read(folder, RANK_FILE.format(rank), lazy=True)
        if {role: {k: tuple(v) for k, v in of.items()} for role, of in own['layout'].items()} == layout:
            return own
    joined = Joined(folder, common)
    first = joined.ranks[0]
    result: Dict[str, Any] = dict(layout=layout, weights={}, optimizer={})

    def cut(role: str, values: List[Mapping[str, Tensor]]) -> Dict[str, Tensor]:
        return {name: piece.cut(joined.whole(role, name, values)) for name, piece in shards[role].pieces.items()}

    for role, own_shards in shards.items():
        result['weights'][role] = cut(role, [r['weights'][role] for r in joined.ranks])
        if role in first['optimizer']:
            states = [r['optimizer'][role] for r in joined.ranks]
            keys = {kind: {k for s in states for k in s[kind]} for kind in ('sliced', 'single')}
            result['optimizer'][role] = dict(
                sliced={k: cut(role, [s['sliced'].get(k, {}) for s in states]) for k in keys['sliced']},
                single={k: {name: next(s['single'][k][name] for s in states if name in s['single'].get(k, {}))
                            for name in own_shards.pieces} for k in keys['single']},
                groups=states[0]['groups'])
    if 'student_ema' in first:
        result['student_ema'] = dict(
            steps=first['student_ema']['steps'],
            weights=cut('student', [r['student_ema']['weights'] for r in joined.ranks]))
    return result


def _check_names(folder: Any, common: Mapping[str, Any], shards: Mapping[str, Shards]) -> None:
    saved = {f'{role}.{name}': tuple(shape) for role, of in common['shapes'].items() for name, shape in of.items()}
    own = {f'{role}.{name}': shape for role, of in shards.items() for name, shape in of.shapes.items()}
    if saved != own:
        differ = sorted(k for k in {**saved, **own} if saved.get(k) != own.get(k))[:3]
        raise ValueError(f'the checkpoint {str(folder)!r} does not fit the config\'s model, for example {differ}')


def write(folder: Path, rank: int, common: Dict[str, Any], own: Dict[str, Any], barrier: Any) -> None:
    """Writes a checkpoint whole or not at all: the folder gets its name when every rank is done.

    Args:
        folder (Path): Where to; one that is there already is replaced.
        rank (int): This process's rank.
        common (dict): What is equal on every rank; rank 0 writes it.
        own (dict): This rank's pieces.
        barrier (Callable): Waits for every rank.
    """
    part = folder.with_name(folder.name + '.part')
    if rank == 0:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    barrier()
    torch.save(own, part / RANK_FILE.format(rank))
    if rank == 0:
        torch.save(dict(common, format=FORMAT), part / COMMON_FILE)
    barrier()
    if rank == 0:
        if folder.is_dir():
            shutil.rmtree(folder)
        elif folder.exists():
            folder.unlink()
        part.rename(folder)
    barrier()
