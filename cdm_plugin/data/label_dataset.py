from collections.abc import Callable, Sequence
from typing import Any

from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS

from cdm_plugin.arguments import Count
from cdm_plugin.data.pack_inputs import PackInputs


@DATASETS.register_module()
class LabelDataset(BaseDataset):
    """Class labels as prompts; needs no file. Sample i has the label i mod `num_classes`, so that an epoch is balanced.

    Args:
        num_classes (int): Number of classes.
        length (int, optional): Samples an epoch. Default `num_classes`.
        pipeline (Sequence): Transforms. Default `PackInputs`.
        **kwargs: Other arguments of MMEngine's `BaseDataset`.
    """

    def __init__(self, num_classes: Count, length: Count | None = None,
                 pipeline: Sequence[dict | Callable] = (PackInputs(),), **kwargs: Any) -> None:
        self.num_classes = num_classes
        self.length = num_classes if length is None else length
        super().__init__(pipeline=pipeline, **kwargs)

    def load_data_list(self) -> list[dict[str, int]]:
        """Lists the labels of one epoch."""
        return [dict(prompt=i % self.num_classes) for i in range(self.length)]

    def get_cat_ids(self, idx: int) -> list[int]:
        """Label of one sample, as a list of one, for MMEngine's `ClassBalancedDataset`."""
        return [self.get_data_info(idx)['prompt']]
