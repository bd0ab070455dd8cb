"""Checkpoints of weights that several processes share: a folder of plain tensors, without a pickled object.

One file holds what is equal on every rank (`common.pth`), and one a rank its pieces of the weights, of their moving
average and of the optimizers' state (`rank_N.pth`). A piece is a run of elements of the flattened weight, so any number
of processes, sharded in any such way, reads what any other wrote; nothing here knows who shards.
"""
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from cdm_plugin.compat.checkpoints import damage, register_format, without_program
from cdm_plugin.files import part_of, whole_file, whole_folder

COMMON_FILE, RANK_FILE = 'common.pth', 'rank_{}.pth'
FORMAT = 'cdm_plugin shards 1'
# The moving average, and the role whose it is.
EMA, EMA_ROLE = 'student_ema', 'student'


@dataclass(frozen=True)
class Span:
    """One rank's part of one weight.

    Attributes:
        start (int): Where it starts in the flattened weight.
        numel (int): Its number of elements.
    """
    start: int
    numel: int

    def cut(self, whole: Tensor) -> Tensor:
        """The same part of a whole tensor, flat."""
        return whole.flatten()[self.start:self.start + self.numel]


class Sharded(Protocol):
    """A network whose weights several processes share, as this module sees it.

    Attributes:
        pieces (dict): This rank's part of every weight of which it has one, by name.
        shapes (dict): Shape of every weight, by name.
    """

    @property
    def pieces(self) -> Mapping[str, Span]: ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...


def is_sharded(path: Any) -> bool:
    """Whether a path is a checkpoint made of shards."""
    return Path(path, COMMON_FILE).is_file()


def layout_of(shards: Mapping[str, Sharded]) -> dict[str, dict[str, tuple[int, int]]]:
    """Start and length of this rank's pieces, by role and name."""
    return {role: {name: (piece.start, piece.numel) for name, piece in own.pieces.items()}
            for role, own in shards.items()}


# Writing


def write(folder: Path, rank: int, common: dict[str, Any], own: dict[str, Any],
          gather: Callable[[str | None], list[str | None]]) -> None:
    """Writes a checkpoint whole or not at all: the folder gets its name when every rank is done. If one fails, all do,
    and nobody waits for it.

    Args:
        folder (Path): Where to; one that is there already is replaced.
        rank (int): This process's rank.
        common (dict): What is equal on every rank; rank 0 writes it.
        own (dict): This rank's pieces: their `layout`, `weights` and `optimizer` by role, `student_ema` if there is
            one.
        gather (Callable): Takes a value of this rank, and returns those of all.
    """
    def together(step: Callable[[], Any]) -> Any:
        result, error = None, None
        try:
            result = step()
        except Exception as raised:  # whatever it is, the others must not wait for it
            error = raised
        said = gather(None if error is None else f'{type(error).__name__}: {error}')
        if error is not None:
            raise error
        for other, text in enumerate(said):
            if text is not None:
                raise ValueError(f'the checkpoint {str(folder)!r} was not written, because rank {other} failed: {text}')
        return result

    with ExitStack() as stack:
        part = together(lambda: stack.enter_context(whole_folder(folder)) if rank == 0 else part_of(folder))
        together(lambda: _save(own, part / RANK_FILE.format(rank)))
        together(lambda: _save(dict(common, format=FORMAT), part / COMMON_FILE) if rank == 0 else None)
        together(stack.pop_all().close)


def _save(content: dict[str, Any], path: Path) -> None:
    with whole_file(path) as part:  # which brings it to the disk
        torch.save(content, part)


# Reading


def _read(folder: Any, file: str, lazy: bool = False) -> dict[str, Any]:
    path = Path(folder, file)
    if not path.is_file():
        raise FileNotFoundError(f'the checkpoint {str(folder)!r} is incomplete, it has no {file}: copy it again, or '
                                'resume from an earlier one')
    problem = damage(str(path))
    if problem is None:
        try:
            return torch.load(path, map_location='cpu', weights_only=True, mmap=lazy)
        except (RuntimeError, EOFError, OSError) as error:
            problem = str(error).splitlines()[0]
    raise ValueError(f'the checkpoint {str(folder)!r} is damaged, {file} cannot be read: copy it again, or resume from '
                     f'an earlier one ({problem})')


def files_of(folder: Any) -> list[str]:
    """The files of a checkpoint.

    Raises:
        FileNotFoundError: If there is one rank's less.
        ValueError: If the one that says how many there are is damaged.
    """
    files = [Path(folder, COMMON_FILE),
             *(Path(folder, RANK_FILE.format(rank)) for rank in range(read_common(folder)['world_size']))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(f'it has no {", ".join(missing)}')
    return [str(file) for file in files]


def read_common(folder: Any) -> dict[str, Any]:
    """What is equal on every rank.

    Raises:
        ValueError: If the folder is damaged or of another format.
    """
    common = _read(folder, COMMON_FILE)
    if common.get('format') != FORMAT:
        raise ValueError(f'the checkpoint {str(folder)!r} has the format {common.get("format")!r}, but this version '
                         f'reads {FORMAT!r}')
    return without_program(common)


class Joined:
    """All ranks' pieces of a checkpoint, to be put together one weight at a time (the files stay on the disk)."""

    def __init__(self, folder: Any, common: Mapping[str, Any]) -> None:
        self.shapes = common['shapes']
        self.ranks = [_read(folder, RANK_FILE.format(rank), lazy=True) for rank in range(common['world_size'])]

    def whole(self, role: str, name: str, values: list[Mapping[str, Tensor]]) -> Tensor:
        """One weight (or a tensor that is sliced like it) in its shape, from each rank's values by name."""
        result: Tensor | None = None
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

    def weights(self, role: str) -> Iterator[tuple[str, Tensor]]:
        """A role's whole weights."""
        values = [rank['weights'][role] for rank in self.ranks]
        return ((name, self.whole(role, name, values)) for name in self.shapes[role])

    def ema(self) -> dict[str, Any] | None:
        """The whole moving average, as its `state_dict` has it of a network that is not sharded."""
        if EMA not in self.ranks[0]:
            return None
        values = [rank[EMA]['weights'] for rank in self.ranks]
        return dict(steps=self.ranks[0][EMA]['steps'],
                    weights={name: self.whole(EMA_ROLE, name, values) for name in self.shapes[EMA_ROLE]})


def read_whole(folder: Any, roles: Collection[str] | None = None) -> dict[str, Any]:
    """A checkpoint of shards as one of whole weights, such as a run in one process writes (without optimizers).

    Args:
        folder (str): The checkpoint.
        roles (Collection[str], optional): Sharded roles to read; the others' weights are left out. Default: all.
    """
    common = read_common(folder)
    joined = Joined(folder, common)
    roles = joined.shapes if roles is None else [role for role in joined.shapes if role in roles]
    state = dict(common['state_dict'])
    for role in roles:
        state.update({f'{role}.{name}': weight for name, weight in joined.weights(role)})
    result = {k: v for k, v in common.items() if k not in ('format', 'world_size', 'shapes', 'state_dict')}
    ema = joined.ema() if EMA_ROLE in roles else None
    return dict(result, state_dict=state, **({} if ema is None else {EMA: ema}))


register_format(is_sharded, read_whole, files_of)


def read_pieces(folder: Any, common: Mapping[str, Any], rank: int, world_size: int,
                shards: Mapping[str, Sharded]) -> dict[str, Any]:
    """This rank's pieces: its own file if it holds just these, otherwise cut from the joined files (the checkpoint
    was written by another number of processes, or sharded in another way)."""
    _check_names(folder, common, shards)
    layout = layout_of(shards)
    if common['world_size'] == world_size:
        own = _read(folder, RANK_FILE.format(rank), lazy=True)
        if {role: {k: tuple(v) for k, v in of.items()} for role, of in own['layout'].items()} == layout:
            return own
    joined = Joined(folder, common)
    first = joined.ranks[0]
    result: dict[str, Any] = dict(layout=layout, weights={}, optimizer={})

    def cut(role: str, values: list[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        # Copies: a view would keep the whole weight, and with it all of them.
        return {name: piece.cut(joined.whole(role, name, values)).clone()
                for name, piece in shards[role].pieces.items()}

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
    if EMA in first:
        result[EMA] = dict(steps=first[EMA]['steps'],
                           weights=cut(EMA_ROLE, [r[EMA]['weights'] for r in joined.ranks]))
    return result


def _check_names(folder: Any, common: Mapping[str, Any], shards: Mapping[str, Sharded]) -> None:
    saved = {f'{role}.{name}': tuple(shape) for role, of in common['shapes'].items() for name, shape in of.items()}
    own = {f'{role}.{name}': tuple(shape) for role, of in shards.items() for name, shape in of.shapes.items()}
    if saved != own:
        differ = sorted(k for k in {**saved, **own} if saved.get(k) != own.get(k))[:3]
        raise ValueError(f'the checkpoint {str(folder)!r} does not fit the config\'s model, for example {differ}')
