"""Pixels to the networks' range."""
import numpy as np
import torch
from torch import Tensor


def to_image_tensor(pixels: np.ndarray) -> Tensor:
    """Maps 0..255 to [-1, 1] and puts the channels first.

    Args:
        pixels (np.ndarray): (H, W) or (H, W, C), uint8.

    Returns:
        Tensor: (C, H, W), float32, in [-1, 1]; C is 1 for (H, W).
    """
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    channels_first = np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32)
    return torch.from_numpy(channels_first / 127.5 - 1)
