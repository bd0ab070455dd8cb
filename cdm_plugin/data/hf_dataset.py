from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS

from cdm_plugin.data.hub_source import open_source, raw_sample
from cdm_plugin.data.pack_inputs import PackInputs
from cdm_plugin.data.sample import SampleError


@DATASETS.register_module()
class HFDataset(BaseDataset):
    """A dataset of Hugging Face `datasets`, as a map-style dataset: rows are read from its files when they are asked
    for. Needs `pip install 'cdm_plugin[data]'`.

    A raw sample holds the columns of its row; pictures as PIL images, not decoded yet, and for each class label
    `<column>_name`, its name.

    Args:
        path (str): A repository of the hub, a folder (of `save_to_disk`, or of files that the library knows), or the
            name of a builder with `data_files`: 'parquet', 'json' (jsonl too), 'csv', 'imagefolder', 'webdataset'.
        split (str): Name of the split, also with a slice, 'train[:1000]' (not of `save_to_disk`). Default 'train'.
        options (Mapping): Other arguments of `datasets.load_dataset`: `name`, `data_files`, `data_dir`, `revision`,
            `cache_dir`, ... Default none.
        pipeline (Sequence): Transforms. Default `PackInputs`, which takes the columns `prompt` and, if it holds
            pictures, `image`.
        **kwargs: Other arguments of MMEngine's `BaseDataset`, such as `indices`.

    Raises:
        ImportError: If the package `datasets` is missing.
        ValueError: If there is no such dataset, or it has no rows.
    """

    def __init__(self, path: str, split: str = 'train', options: Mapping[str, Any] = {},
                 pipeline: Sequence[dict | Callable] = (PackInputs(),), **kwargs: Any) -> None:
        self.path, self.split, self.options = path, split, dict(options)
        super().__init__(pipeline=pipeline, serialize_data=False, **kwargs)

    def load_data_list(self) -> Any:
        """Opens the dataset; its rows stay where they are."""
        found = open_source(type(self).__name__, self.path, self.split, False, self.options)
        if not len(found):
            raise ValueError(f'{type(self).__name__} path={self.path!r}, split={self.split!r} has no rows')
        return found

    def get_data_info(self, idx: int) -> dict[str, Any]:
        """Raw sample: the columns of a row, and `sample_idx`.

        Args:
            idx (int): Index of the sample.
        """
        self.full_init()
        idx = idx if idx >= 0 else len(self) + idx
        sample = raw_sample(self.data_list[idx], self.data_list.features, self._where(idx))
        return {**sample, 'sample_idx': idx}

    def prepare_data(self, idx: int) -> Any:
        """A sample through the pipeline; what is wrong with it is named by row."""
        try:
            return super().prepare_data(idx)
        except SampleError as error:
            raise SampleError(f'{self._where(idx)}: {error}') from error

    def _where(self, idx: int) -> str:
        return f'{type(self).__name__} path={self.path!r}, split={self.split!r}, row {idx}'

    def _get_unserialized_subset(self, indices: Sequence[int] | int) -> Any:
        if isinstance(indices, int):
            size = len(self.data_list)
            indices = range(min(indices, size)) if indices >= 0 else range(max(0, size + indices), size)
        return self.data_list.select(indices)
