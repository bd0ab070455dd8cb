"""Pictures for people: tensors to pixels, contact sheets, PNG files."""
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from cdm_plugin.files import whole_file
from cdm_plugin.labels import draw_label, label_width

GAP = 2
# Largest side of an image on a contact sheet, in pixels.
SHEET_SIDE = 256


def to_pixels(images: Tensor) -> np.ndarray:
    """Images in [-1, 1], (B, 3 or 1, H, W), as uint8 RGB (B, H, W, 3)."""
    if images.shape[1] not in (1, 3):
        raise ValueError(f'images have {images.shape[1]} channels, expected 1 or 3')
    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte().expand(-1, 3, -1, -1)
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


def labelled_grid(rows: dict[str, Tensor], min_side: int = 48, max_side: int = SHEET_SIDE) -> np.ndarray:
    """A contact sheet: one row a name, with the name at its left.

    Args:
        rows (dict): Name -> images in [-1, 1], (N, 3 or 1, H, W); all of one size.
        min_side (int): Smaller images are enlarged by a whole factor to at least this side. Default 48.
        max_side (int): Larger images are shrunk to this side, so that a sheet stays a picture. Default 256.

    Returns:
        ndarray: uint8 RGB, (height, width, 3).
    """
    pixels = {name: to_pixels(images) for name, images in rows.items()}
    height, width = next(iter(pixels.values())).shape[1:3]
    factor = -(-min_side // min(height, width)) if min(height, width) < min_side else 1
    shrink = min(1.0, max_side / max(height, width))
    height, width = max(1, round(height * factor * shrink)), max(1, round(width * factor * shrink))
    resampling = Image.Resampling.LANCZOS if shrink < 1 else Image.Resampling.NEAREST
    size = max(12, min(24, height // 4))
    margin = 4 * GAP + max(label_width(name, size) for name in rows)
    columns = max(len(p) for p in pixels.values())
    sheet = Image.new('RGB', (margin + columns * (width + GAP), len(rows) * (height + GAP)), 'white')
    for i, (name, row) in enumerate(pixels.items()):
        top = i * (height + GAP)
        draw_label(sheet, GAP, top + height // 2, name, size)
        for j, image in enumerate(row):
            tile = Image.fromarray(image).resize((width, height), resampling)
            sheet.paste(tile, (margin + j * (width + GAP), top))
    return np.asarray(sheet)


def bars(counts: np.ndarray, width: int = 8, height: int = 120) -> np.ndarray:
    """A bar chart as a picture, the highest bar as high as the picture.

    Args:
        counts (ndarray): Of the bars, from left to right, (N,).
        width (int): Of a bar in pixels. Default 8.
        height (int): Of the picture in pixels. Default 120.

    Returns:
        ndarray: uint8 RGB, (height, width * number of bars, 3).
    """
    tops = np.rint(counts * height / max(1, counts.max())).astype(int)
    filled = np.repeat(np.arange(height)[::-1, None] < tops, width, axis=1)
    return np.where(filled[..., None], np.array([31, 119, 180], np.uint8), np.uint8(255))


def save_png(pixels: np.ndarray, path: str | Path) -> Path:
    """Writes uint8 pixels, RGB (H, W, 3) or gray (H, W), whole or not at all; makes the folder, returns the path."""
    path = Path(path)
    with whole_file(path) as part:
        Image.fromarray(pixels).save(part, format='PNG')
    return path


def save_pngs(images: Tensor, folder: str | Path, names: Sequence[str]) -> None:
    """Writes one PNG an image, named `<name>.png`."""
    for name, image in zip(names, to_pixels(images)):
        save_png(image, Path(folder, f'{name}.png'))
