"""The one reader of pictures, for training and metrics alike: files, PIL images and arrays to the networks' range."""
import io
import logging
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.logging import print_log
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from cdm_plugin.data.sample import SampleError

SUFFIXES = ('.bmp', '.gif', '.jpeg', '.jpg', '.png', '.tif', '.tiff', '.webp')
# What interpolation may overshoot by; ImageNet's mean and deviation give 2 and more.
TOLERATED = 1.6
# Of a PNG, the chunks that say its size and which side of it is up.
PNG_HEADER = (b'IHDR', b'eXIf', b'tEXt', b'zTXt', b'iTXt')
WITH_ALPHA = ('LA', 'La', 'PA', 'RGBA', 'RGBa')
_animated: list[str] = []  # the first that this process has met


def read_image(source: str | Path | Image.Image | np.ndarray, channels: int | None = 3,
               background: str = 'white') -> Tensor:
    """Reads a picture: upright as its EXIF data say, without transparency, the first frame of an animation.

    Args:
        source (str or Path or PIL.Image.Image or np.ndarray): A file, an image, or pixels (H, W) or (H, W, C), uint8
            or uint16, in RGB order; two channels are gray and alpha, four RGB and alpha.
        channels (int, optional): 3 (gray is repeated), 1 (colour becomes its luminance), or None: 1 of a gray picture
            without transparency, 3 of any other. Default 3.
        background (str): Colour behind transparent pixels, as PIL names it. Default 'white'.

    Returns:
        Tensor: (C, H, W), float32, in [-1, 1].

    Raises:
        SampleError: If it is no picture, a broken or a huge one, or of a mode whose range nobody knows (32 bits). One
            line that names the file and the reason.
    """
    try:
        pixels = _decode(source, background)
        if pixels.ndim == 3 and channels == 1:
            pixels = np.asarray(Image.fromarray(pixels).convert('L'))
        elif pixels.ndim == 2 and channels == 3:
            pixels = pixels[..., None].repeat(3, 2)
        return to_image_tensor(pixels)
    except Exception as error:  # decoders raise SyntaxError, struct.error, DecompressionBombError and more
        name = source if isinstance(source, (str, Path)) else getattr(source, 'filename', '') or type(source).__name__
        raise SampleError(f'{str(name)!r} is no readable image ({_reason(error)})') from error


def open_image(source: str | bytes, name: str) -> Image.Image:
    """Opens a picture that `read_image` reads later: its pixels are decoded there.

    Args:
        source (str or bytes): A file, or what one holds.
        name (str): What to call it in messages.

    Raises:
        SampleError: If it is no picture. One line that names it.
    """
    try:
        image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    except Exception as error:
        raise SampleError(f'{name!r} is no readable image ({_reason(error)})') from error
    image.filename = name
    return image


def upright_size(file: str | Path) -> tuple[int, int]:
    """Height and width of what `read_image` makes of a file, without decoding its pixels.

    Raises:
        SampleError: If it is no picture. One line that names it.
    """
    try:
        with Image.open(file) as image:
            width, height = image.size
            kind, exif = image.format, {} if image.format == 'PNG' else image.getexif()
        if kind == 'PNG':
            with Image.open(_without_pixels(file)) as header:
                exif = Image.Image.getexif(header)  # PNG's own looks for what may stand behind the pixels
    except Exception as error:
        raise SampleError(f'{str(file)!r} is no readable image ({_reason(error)})') from error
    turned = kind != 'TIFF' and exif.get(ExifTags.Base.Orientation) in (5, 6, 7, 8)  # PIL opens a TIFF upright
    return (width, height) if turned else (height, width)


def _without_pixels(file: str | Path) -> io.BytesIO:
    """The header of a PNG, with what of it stands behind the pixels."""
    with open(file, 'rb') as png:
        kept = [png.read(8)]
        while len(head := png.read(8)) == 8:
            length, kind = struct.unpack('>I4s', head)
            if kind in PNG_HEADER:
                kept.append(head + png.read(length + 4))
            else:
                png.seek(length + 4, os.SEEK_CUR)
    return io.BytesIO(b''.join(kept) + struct.pack('>I4s', 0, b'IDAT'))


def to_image_tensor(pixels: np.ndarray) -> Tensor:
    """Maps the range of the dtype to [-1, 1] and puts the channels first.

    Args:
        pixels (np.ndarray): (H, W) or (H, W, C), uint8 or uint16.

    Returns:
        Tensor: (C, H, W), float32, in [-1, 1]; C is 1 for (H, W).
    """
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    channels_first = np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32)
    return torch.from_numpy(channels_first / (np.iinfo(pixels.dtype).max / 2) - 1)


def check_pictures(pictures: Sequence[Any], backbone: Any, latent_sizes: Sequence[tuple[int, int]]) -> None:
    """A first look at pictures of a dataset: their range, and their size.

    Args:
        pictures (Sequence): Some of them; what is no float tensor (C, H, W) is left to the data preprocessor.
        backbone (Backbone): What is trained.
        latent_sizes (Sequence): Height and width of the latents of `model.image_size`.

    Raises:
        ValueError: If codec or network cannot take their size, or pixels lie far outside [-1, 1], as those of 0 to
            255 or of ImageNet's mean and deviation do.
    """
    pictures = [p for p in pictures if isinstance(p, Tensor) and p.is_floating_point() and p.ndim == 3 and p.numel()]
    if not pictures:
        return
    low, high = min(float(p.min()) for p in pictures), max(float(p.max()) for p in pictures)
    if max(-low, high) > TOLERATED:
        raise ValueError(f'pictures of train_dataloader.dataset must have pixels in [-1, 1], but they lie in '
                         f"[{low:.3g}, {high:.3g}]: scale them in the dataset's pipeline, or give PackInputs uint8 "
                         'pixels')
    if low >= 0 and len(pictures) > 1:
        print_log(f'none of {len(pictures)} pictures of train_dataloader.dataset has a pixel below 0 (they lie in '
                  f'[{low:.3g}, {high:.3g}]), while black is -1: if they are in [0, 1], train on 2 x - 1, or give '
                  'PackInputs uint8 pixels', 'current', level=logging.WARNING)
    others = set()
    for height, width in sorted({tuple(p.shape[1:]) for p in pictures}):
        try:
            size = backbone.codec.latent_size(height, width)
            backbone.check_latent_size(size, (height, width))
        except ValueError as error:
            raise ValueError(f'pictures of train_dataloader.dataset: {error}; '
                             "dict(type='ResizeCrop', sizes=...) in its pipeline brings them to a size") from None
        if size not in latent_sizes:
            others.add((height, width))
    if others:
        sizes = ', '.join(f'{height}x{width}' for height, width in sorted(others)[:3])
        print_log(f'pictures of train_dataloader.dataset have {sizes} pixels '
                  '(height x width), which model.image_size has not: they train at their own size, while what is '
                  'sampled in validation, grids and exports has that of model.image_size', 'current',
                  level=logging.WARNING)


def _reason(error: Exception) -> str:
    return 'of no known format' if isinstance(error, UnidentifiedImageError) else (
        getattr(error, 'strerror', None) or ' '.join(str(error).split()) or type(error).__name__)


def _decode(source: str | Path | Image.Image | np.ndarray, background: str) -> np.ndarray:
    """Pixels (H, W) or (H, W, 3)."""
    if isinstance(source, (str, Path)):
        with Image.open(source) as image:
            return _decode(image, background)
    if isinstance(source, np.ndarray):
        pixels = source[..., 0] if source.shape[2:] == (1,) else source
        if pixels.ndim == 2 or pixels.shape[2:] == (3,):
            return pixels
        source = Image.fromarray(pixels)
    if getattr(source, 'is_animated', False) and not _animated:
        _animated.append(getattr(source, 'filename', ''))
        print_log(f'{_animated[0]!r} is animated: of such pictures the first frame is taken (said once)', 'current',
                  level=logging.WARNING)
    image = ImageOps.exif_transpose(source)
    if image.mode in ('I', 'F'):
        raise ValueError(f'mode {image.mode} has 32 bits and no range of its own: save it with 8 or 16 bits')
    if image.mode.startswith('I;16'):
        return np.asarray(image).astype(np.uint16)
    if image.mode in WITH_ALPHA or 'transparency' in image.info:
        canvas = Image.new('RGBA', image.size, background)
        canvas.alpha_composite(image.convert('RGBA'))
        image = canvas
    return np.asarray(image.convert('L' if image.mode in ('1', 'L') else 'RGB'))
