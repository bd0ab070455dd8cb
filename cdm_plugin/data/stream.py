"""Records that are read in the order in which they lie, from shards: what streams of every library share."""
import json
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Annotated, Any, Literal, NamedTuple

from annotated_types import Ge
from mmengine.dataset import Compose
from mmengine.dist import get_dist_info
from mmengine.logging import print_log
from torch.utils.data import IterableDataset, get_worker_info

from cdm_plugin.data.captions import every_variant
from cdm_plugin.data.sample import Sample, SampleError
from cdm_plugin.draws import drawn_by

# Field of a packed sample with the position of its reader behind it, as text, which every collate function keeps.
POSITION = '__position__'
# What MMEngine's hooks, which ask each loader for its length, are told.
ENDLESS = 2**40
# Passes in a row in which a reader may have drawn nothing but empty shards.
EMPTY = 100


class Position(NamedTuple):
    """How far one reader has come.

    Attributes:
        turn (int): Passes over all shards before this one.
        shard (int): Place, among the reader's shards of this pass, of the one in which its window begins.
        row (int): Record of that shard with which the window begins.
        seen (int): Records that the reader has met before the window, other readers' included.
        taken (int): Samples of the window that it has given.
    """
    turn: int = 0
    shard: int = 0
    row: int = 0
    seen: int = 0
    taken: int = 0


class Stream(IterableDataset):
    """An endless stream of samples: one pass over the shards after another.

    Every worker of every rank is a reader. With as many shards as readers or more, each shard of a pass belongs to one
    reader; with fewer, every reader goes through all shards and takes each n-th record. Each sample comes once a
    pass. The order is a function of `seed` and of the number of readers alone, and what the pipeline draws for a sample
    of `seed`, the pass and the record. Each sample says how far its reader has come, so that a run goes on with the
    next one (`StreamHook`).

    A subclass gives `num_shards` and `fingerprint`, `read` and, if need be, `decode`.

    Args:
        pipeline (Sequence): Transforms; a sample for which they give None is left out.
        shuffle (int): Records in the window within which a reader mixes the order; with 1 or more the shards too come
            in another order each pass. A window is held in memory, undecoded. Default 0, the order of the files.
        share (str, optional): 'shards' or 'samples', what is shared among the readers. By samples all of them have
            come equally often at any time, at the price that each reader reads all files; by shards one that has read
            its own begins its next pass while others are in this one. Default None: shards, if there are enough.
        seed (int): Of the order. Default 0.
        max_bad (int): Records that a reader leaves out because they cannot be read, each named in the log, before it
            ends the run; one counts once, whatever the passes, and of a file that is damaged all that follows is one.
            Default 0.

    Raises:
        ValueError: If an argument is out of range.
    """
    metainfo: Mapping[str, Any] = {}

    def __init__(self, pipeline: Sequence[dict | Callable], shuffle: Annotated[int, Ge(0)] = 0,
                 share: Literal['shards', 'samples'] | None = None, seed: int = 0,
                 max_bad: Annotated[int, Ge(0)] = 0) -> None:
        self.pipeline, self.shuffle, self.share, self.seed = Compose(pipeline), shuffle, share, seed
        self.max_bad = max_bad
        self._bad: set[str] = set()
        self.rank, self.world_size = get_dist_info()  # here: a worker that is spawned does not know
        self.go_on({}, 0)

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        raise NotImplementedError

    @property
    def fingerprint(self) -> str:
        """What the shards are: positions of another fingerprint's stream mean nothing here."""
        raise NotImplementedError

    def read(self, shard: int) -> Iterator[tuple[str, Any]]:
        """Reads the records of a shard from its beginning: where each one stands, for messages, and what is there."""
        raise NotImplementedError

    def decode(self, record: Any) -> dict[str, Any]:
        """Makes the raw sample of a record."""
        return dict(record)

    def __len__(self) -> int:
        return ENDLESS

    def go_on(self, positions: Mapping[int, Position], worker: int) -> None:
        """Lets the stream go on where it stopped.

        Args:
            positions (Mapping): Position of each of this rank's readers, by the number of its worker.
            worker (int): The worker whose batch is the next.
        """
        self._positions, self._next_worker = dict(positions), worker

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        workers = 1 if info is None else info.num_workers
        worker = (self._next_worker + (0 if info is None else info.id)) % workers
        records = self._records(self.rank * workers + worker, self.world_size * workers,
                                self._positions.get(worker, Position()))
        for visit, found, position in records:
            for sample in self._samples(visit, found):
                sample[POSITION] = json.dumps([worker, *position])
                yield sample

    def once(self, variants: bool = False) -> Iterator[dict[str, Any]]:
        """All samples in one pass of one reader, which is not the training's.

        Args:
            variants (bool): Whether a sample comes with each prompt that may be drawn for it. Default False.
        """
        for visit, found, _ in self._records(0, 1, Position(), endless=False):
            yield from self._samples(visit, found, variants)

    def _samples(self, visit: str, found: tuple[str, Any], variants: bool = False) -> Iterator[dict[str, Any]]:
        """What a record gives: one sample, one a variant, or none."""
        try:
            if variants:
                samples = every_variant(lambda: self._sample(found[1]))
            else:
                with drawn_by(visit):
                    samples = iter([self._sample(found[1])])
            yield from (sample for sample in samples if sample is not None)
        except SampleError as error:
            self._leave_out(found[0], SampleError(f'{found[0]}: {error}'))

    def _leave_out(self, place: str, error: SampleError) -> None:
        if place in self._bad:
            return
        if len(self._bad) == self.max_bad:
            raise error
        self._bad.add(place)
        print_log(f'left out, because it cannot be read: {error}', 'current', level=logging.WARNING)

    def _sample(self, record: Any) -> dict[str, Any] | None:
        sample = self.pipeline(self.decode(record))
        if sample is not None and not isinstance(sample, Mapping):
            raise SampleError(f'the pipeline of {type(self).__name__} gives a {type(sample).__name__}, but must give '
                              'a sample (a dict), or None to leave it out')
        return None if sample is None else Sample(sample)

    def _records(self, reader: int, readers: int, start: Position,
                 endless: bool = True) -> Iterator[tuple[str, tuple[str, Any], Position]]:
        """What one of several readers reads: what makes the reading unique, the record, the position behind it."""
        by_shard = self._by_shard(readers)
        every, mine = (1, 0) if by_shard else (readers, reader)
        turn, shard, row, seen, taken = start
        empty = 0
        while True:
            shards = self._order(turn)[reader::readers] if by_shard else self._order(turn)
            window, begin, before = [], Position(turn, shard, row, seen), seen
            for shard in range(shard, len(shards)):
                for record in self._rest(shards[shard], row):
                    row += 1
                    if seen % every == mine:
                        window.append((f'{self.seed}/{turn}/{shards[shard]}/{row}', record))
                    seen += 1
                    if len(window) > max(0, self.shuffle - 1):
                        yield from self._mixed(window, begin._replace(taken=taken))
                        window, begin, taken = [], Position(turn, shard, row, seen), 0
                row = 0
            yield from self._mixed(window, begin._replace(taken=taken))
            empty = 0 if seen > before else empty + 1
            if empty > (EMPTY if self.shuffle and by_shard else 1):
                raise ValueError(f'a reader of {type(self).__name__} found no record in its shards of '
                                 f"{self.fingerprint}: remove empty ones, or set share='samples'")
            if not endless:
                return
            turn, shard, row, taken = turn + 1, 0, 0, 0

    def _rest(self, shard: int, row: int) -> Iterator[tuple[str, Any]]:
        """The records of a shard from one on."""
        try:
            yield from islice(self.read(shard), row, None)
        except SampleError as error:  # of the file: what follows cannot be read
            self._leave_out(f'shard {shard}', error)

    def _mixed(self, window: list[Any], begin: Position) -> Iterator[tuple[str, tuple[str, Any], Position]]:
        """The rest of a window, in its order."""
        order = list(range(len(window)))
        if self.shuffle:
            random.Random(f'{self.seed} {begin[:4]}').shuffle(order)
        for taken in range(begin.taken, len(order)):
            yield *window[order[taken]], begin._replace(taken=taken + 1)

    def _order(self, turn: int) -> list[int]:
        """The shards of a pass, the same for every reader."""
        order = list(range(self.num_shards))
        if self.shuffle:
            random.Random(f'{self.seed} {turn}').shuffle(order)
        return order

    def _by_shard(self, readers: int) -> bool:
        if self.share == 'shards' and self.num_shards < readers:
            raise ValueError(f"`share` of {type(self).__name__} is 'shards', of which there are {self.num_shards} for "
                             f'{readers} readers (ranks x workers): lower train_dataloader.num_workers, or set '
                             "'samples'")
        return self.share != 'samples' and self.num_shards >= readers
