import zipfile
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS

from cdm_plugin.assets import resolve
from cdm_plugin.data.images import read_image
from cdm_plugin.data.pack_inputs import PackInputs


@DATASETS.register_module()
class ImageLabelDataset(BaseDataset):
    """Small images with class labels, from one `.npz` file that is held in memory.

    The file holds `images`, uint8, (N, H, W) or (N, H, W, C), and `labels`, integers, (N,). A sample holds `image`
    (Tensor, (C, H, W), float32, in [-1, 1], see `read_image`) and `prompt` (int, the label).

    Args:
        data_file (str): The file; `asset:NAME` for one that comes with the package.
        data_root (str): Folder that a relative `data_file` starts from. Default ''.
        pipeline (Sequence): Transforms. Default `PackInputs`.
        **kwargs: Other arguments of MMEngine's `BaseDataset`; `indices` takes a split of the file (1000: the first
            thousand, -500: the last five hundred, or a list).

    Raises:
        FileNotFoundError: If `data_file` does not exist.
        ValueError: If it is not such a file.
    """

    def __init__(self, data_file: str, data_root: str = '', pipeline: Sequence[dict | Callable] = (PackInputs(),),
                 **kwargs: Any) -> None:
        super().__init__(ann_file=resolve(data_file), data_root=resolve(data_root), pipeline=pipeline, **kwargs)

    def load_data_list(self) -> list[dict[str, int]]:
        """Reads the file and lists its rows and labels."""
        self.images, labels = self._load()
        return [dict(row=row, prompt=int(label)) for row, label in enumerate(labels)]

    def get_data_info(self, idx: int) -> dict[str, Any]:
        """Raw sample, with its image.

        Args:
            idx (int): Index of the sample.

        Returns:
            dict: `prompt`, `image`, and `sample_idx`.
        """
        sample = super().get_data_info(idx)
        sample['image'] = read_image(self.images[sample.pop('row')], channels=None)
        return sample

    def get_cat_ids(self, idx: int) -> list[int]:
        """Label of one sample, as a list of one, for MMEngine's `ClassBalancedDataset`."""
        return [super().get_data_info(idx)['prompt']]

    def _load(self) -> tuple[np.ndarray, np.ndarray]:
        where = f'`data_file` {self.ann_file}'
        try:
            with np.load(self.ann_file, allow_pickle=False) as arrays:
                images, labels = arrays['images'], arrays['labels']
        except FileNotFoundError:
            raise FileNotFoundError(f'{where} does not exist: check it, and `data_root`') from None
        except KeyError:
            raise ValueError(f'{where} needs the arrays images and labels, but has {sorted(arrays)}') from None
        # An .npy file gives a bare array, which is no context manager.
        except (OSError, EOFError, ValueError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f'{where} is damaged or not an .npz file ({error}): write it with numpy.savez') from error
        _check(images, labels, where)
        return images, labels


def _check(images: np.ndarray, labels: np.ndarray, where: str) -> None:
    has_image_shape = images.ndim == 3 or images.ndim == 4 and images.shape[-1] <= 4
    if images.dtype != np.uint8 or not has_image_shape:
        raise ValueError(f'{where}: images must be uint8, (N, H, W) or (N, H, W, C), but are {images.dtype}, '
                         f'{images.shape}')
    if not np.issubdtype(labels.dtype, np.integer) or labels.ndim != 1:
        raise ValueError(f'{where}: labels must be integers, (N,), but are {labels.dtype}, {labels.shape}')
    if len(images) != len(labels):
        raise ValueError(f'{where}: {len(images)} images, but {len(labels)} labels')
    if len(images) == 0:
        raise ValueError(f'{where} holds no images')
