"""Records that cannot be read: left out, counted and named, up to a limit."""
import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, cast

import torch
from mmengine.logging import print_log
from mmengine.registry import DATASETS
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from cdm_plugin.arguments import Count
from cdm_plugin.data.sample import SampleError
from cdm_plugin.data.wrappers import leaves, parts
from cdm_plugin.draws import stream
from cdm_plugin.errors import describe

# Of those that an error lists.
SHOWN = 5
_left_out: ContextVar[list[str] | None] = ContextVar('left_out', default=None)


def leave_out(error: ValueError | FileNotFoundError) -> None:
    """What a dataset that loads its list does with a malformed row: an error, or none in a `SkipBadRecords`.

    Raises:
        ValueError, FileNotFoundError: The error, outside of one.
    """
    rows = _left_out.get()
    if rows is None:
        raise error
    rows.append(describe(error))


@contextlib.contextmanager
def _leaving_out(rows: list[str]) -> Iterator[None]:
    token = _left_out.set(rows)
    try:
        yield
    finally:
        _left_out.reset(token)


@DATASETS.register_module()
class SkipBadRecords(Dataset):
    """A dataset whose records may be bad, some of them: a picture that is broken or missing, a malformed row.

    A malformed row of a prompt file is left out when it is loaded. In the place of a sample that cannot be read comes
    another one of the dataset, a function of the bad one's number alone. Each is named in the log when it is met, by
    its file and line where the dataset knows them; CDMHook logs their number over workers and ranks as the scalar
    `bad_records`.

    Args:
        dataset (dict): The dataset, of any library.
        limit (int): How many bad records there may be, on all ranks together. Default 100.

    Attributes:
        left_out (list[str]): What is wrong with the rows that were left out.

    Raises:
        ValueError: If the dataset is a stream.
        SampleError: If there are more bad records than `limit`. It names the first ones.
    """

    def __init__(self, dataset: dict[str, Any] | Dataset, limit: Count = 100) -> None:
        self.limit = limit
        self.left_out: list[str] = []
        with _leaving_out(self.left_out):
            self.dataset: Any = DATASETS.build(dataset) if isinstance(dataset, Mapping) else cast(Any, dataset)
            if hasattr(self.dataset, 'full_init'):
                self.dataset.full_init()
        if isinstance(self.dataset, IterableDataset) or not hasattr(self.dataset, '__len__'):
            raise ValueError(f'SkipBadRecords.dataset is a {type(self.dataset).__name__}, a stream without numbers: '
                             'set its own max_bad, or take a dataset with a length')
        # By record, whether it is bad. Shared by the processes that load for this one.
        self._bad = torch.zeros(len(self.dataset), dtype=torch.uint8).share_memory_()
        self._groups: list[Tensor] = [torch.arange(len(self.dataset))]
        self._group = torch.zeros(len(self.dataset), dtype=torch.int64)
        for row in self.left_out:
            self._log(row)
        self.check(self.bad)

    @property
    def metainfo(self) -> dict[str, Any]:
        """The dataset's."""
        return getattr(self.dataset, 'metainfo', {})

    @property
    def bad(self) -> list[int]:
        """Numbers of the records that were found bad on this rank."""
        return self._bad.nonzero().flatten().tolist()

    def full_init(self) -> None:
        """MMEngine's name for loading the dataset, which is done."""

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        place, others = index, self._groups[int(self._group[index])]
        generator = stream('bad record', index)
        while True:
            if not self._bad[place]:
                try:
                    return self.dataset[place]
                except MemoryError:
                    raise
                except Exception as error:  # whatever a loader or decoder raises
                    self.add(place, error)
            if self._bad[others].all():
                raise SampleError(f'no record is left to stand in for {self._place(index)}: {self._list(self.bad)}')
            place = int(others[torch.randint(len(others), (), generator=generator)])

    def get_data_info(self, index: int) -> dict[str, Any]:
        """Raw sample, as the dataset has it."""
        return self.dataset.get_data_info(index)

    def replace_within(self, groups: Iterable[list[int]]) -> None:
        """From now on only a record of the same group stands in for a bad one.

        Args:
            groups (Iterable[list[int]]): Numbers of records, such as those of one size.
        """
        self._groups = [torch.tensor(group) for group in groups]
        for number, group in enumerate(self._groups):
            self._group[group] = number

    def add(self, index: int, error: Exception) -> None:
        """Notes that a record is bad.

        Raises:
            SampleError: If it is one too many.
        """
        self._bad[index] = 1
        self._log(f'{self._place(index)}: {describe(error)}')
        self.check(self.bad)

    def check(self, bad: Iterable[int]) -> None:
        """Raises SampleError if these records, beside the rows that were left out, are more than the limit."""
        bad = list(bad)
        count = len(bad) + len(self.left_out)
        if count > self.limit:
            raise SampleError(f'{count} bad records are more than SkipBadRecords.limit={self.limit}: mend them, or '
                              f'raise the limit; the first are {self._list(bad)}')

    def _log(self, what: str) -> None:
        print_log(f'left out, because it cannot be read: {what}', 'current', level=logging.WARNING)

    def _list(self, bad: list[int]) -> str:
        """The first of the bad records, each with what is wrong with it now."""
        texts = self.left_out[:SHOWN]
        for index in bad[:SHOWN - len(texts)]:
            try:
                self.dataset[index]
                texts.append(f'{self._place(index)}: readable by now')
            except Exception as error:
                texts.append(f'{self._place(index)}: {describe(error)}')
        more = len(bad) + len(self.left_out) - len(texts)
        return '; '.join(texts) + (f'; and {more} more' if more > 0 else '')

    def _place(self, index: int) -> str:
        """File and line of a record, as far as they are known."""
        inner = list(leaves(self.dataset))
        name = f'record {index} of {type(self.dataset).__name__}'
        with contextlib.suppress(Exception):
            line = self.dataset.get_data_info(index)['ann_line']
            name = f'{inner[0].ann_file}, line {line}' if len(inner) == 1 else f'line {line}, {name}'
        return name


def skipping_datasets(dataset: Any) -> list[SkipBadRecords]:
    """All `SkipBadRecords` in a dataset, wrappers included, in their order."""
    return [part for part in parts(dataset) if isinstance(part, SkipBadRecords)]
