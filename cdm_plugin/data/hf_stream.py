from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from mmengine.registry import DATASETS

from cdm_plugin.data.hub_source import named, open_source, raw_sample
from cdm_plugin.data.pack_inputs import PackInputs
from cdm_plugin.data.sample import SampleError
from cdm_plugin.data.stream import Stream

# Rows that the library hands over at a time.
BLOCK = 64


@DATASETS.register_module()
class HFStream(Stream):
    """A dataset of Hugging Face `datasets` that is read while training goes on (`streaming=True`), without end. Needs
    `pip install 'cdm_plugin[data]'`.

    Its shards are the library's: mostly one a file. A raw sample is as that of `HFDataset`.

    Args:
        path (str): As for `HFDataset`.
        split (str): Likewise. Default 'train'.
        options (Mapping): Likewise. Default none.
        pipeline (Sequence): Transforms. Default `PackInputs`.
        **kwargs: `shuffle`, `share`, `seed` and `max_bad` of `Stream`.

    Raises:
        ImportError: If the package `datasets` is missing.
        ValueError: If there is no such dataset.
    """

    def __init__(self, path: str, split: str = 'train', options: Mapping[str, Any] = {},
                 pipeline: Sequence[dict | Callable] = (PackInputs(),), **kwargs: Any) -> None:
        super().__init__(pipeline, **kwargs)
        self.path, self.split, self.options = path, split, dict(options)
        self._source  # what is wrong with it is said here

    @cached_property
    def _source(self) -> Any:
        return open_source(type(self).__name__, self.path, self.split, True, self.options)

    @property
    def num_shards(self) -> int:
        return self._source.num_shards

    @property
    def fingerprint(self) -> str:
        return f'path={self.path!r}, split={self.split!r}{named(self.options)}, {self.num_shards} shards'

    def read(self, shard: int) -> Iterator[tuple[str, Any]]:
        where = f'{type(self).__name__} path={self.path!r}, split={self.split!r}, shard {shard} of {self.num_shards}'
        number = 0
        # Not the library's own iterator, which would share the rows of this one shard among the workers once more.
        blocks = self._source.shard(self.num_shards, shard).iter(BLOCK)
        while True:
            try:
                block = next(blocks, None)
            except Exception as error:
                raise SampleError(f'{where}, behind row {number}: {type(error).__name__}: {error}') from error
            if block is None:
                return
            for values in zip(*block.values()):
                place = f'{where}, row {number}'
                yield place, (place, dict(zip(block, values)))
                number += 1

    def decode(self, record: tuple[str, Any]) -> dict[str, Any]:
        place, row = record
        return raw_sample(row, self._source.features, place)
