from typing import Any, Callable, Dict, List, Optional, Sequence, Union

from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS

from cdm_plugin.data.pack_inputs import PackInputs


@DATASETS.register_module()
class LabelDataset(BaseDataset):
    """Class labels as prompts; needs no file. Sample i has the label i mod `num_classes`, so that an epoch is balanced.

    Args:
        num_classes (int): Number of classes.
        length (int, optional): Samples an epoch. Default `num_classes`.
        pipeline (Sequence): Transforms. Default `PackInputs`.
        **kwargs: Other arguments of MMEngine's `BaseDataset`.

    Raises:
        ValueError: If `num_classes` or `length` is not a whole number of 1 or more.
    """

    def __init__(self, num_classes: int, length: Optional[int] = None,
                 pipeline: Sequence[Union[dict, Callable]] = (PackInputs(),), **kwargs: Any) -> None:
        self.num_classes = num_classes
        self.length = num_classes if length is None else length
        for key, value in (('num_classes', num_classes), ('length', self.length)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f'`{key}` of LabelDataset must be a whole number of 1 or more, but is {value!r}')
        super().__init__(pipeline=pipeline, **kwargs)

    def load_data_list(self) -> List[Dict[str, int]]:
        """Lists the labels of one epoch."""
        return [dict(prompt=i % self.num_classes) for i in range(self.length)]

    def get_cat_ids(self, idx: int) -> List[int]:
        """Label of one sample, as a list of one, for MMEngine's `ClassBalancedDataset`."""
        return [self.get_data_info(idx)['prompt']]
