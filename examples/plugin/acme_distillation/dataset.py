"""A dataset: any of MMEngine's will do, or one that gives samples itself, as this one."""
from collections.abc import Sequence
from typing import Any

import torch
from mmengine.registry import DATASETS
from torch import Tensor
from torch.utils.data import Dataset


def picture(index: int, height: int = 8, width: int = 8) -> Tensor:
    """A picture in [-1, 1] of its own, (1, H, W)."""
    return torch.rand(1, height, width, generator=torch.Generator().manual_seed(index)) * 2 - 1


@DATASETS.register_module()
class AcmePictures(Dataset):
    """Pictures of three classes.

    Args:
        length (int): Number of pictures. Default 24.
        sizes (Sequence): Height and width of picture i: sizes[i // 2 % len(sizes)], so that a batch of 2 has one size.
            Default: all 8 by 8.
    """

    def __init__(self, length: int = 24, sizes: Sequence[tuple[int, int]] = ((8, 8),)) -> None:
        self.length, self.sizes = length, sizes

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`prompt` is a text or a label, `image` (C, H, W) in [-1, 1] if there are pictures."""
        return dict(prompt=index % 3, image=picture(index, *self.sizes[index // 2 % len(self.sizes)]))
