"""Makes the 16x16 digits that the demo and the tests use.

    python benchmarks/make_digits.py --source mnist_10k.npz
"""
import argparse
from pathlib import Path

import numpy as np
from PIL import Image

OUTPUT = Path(__file__).parents[1] / 'cdm_plugin/assets/digits/digits_16.npz'
SIZE = 16


def shrink(picture: np.ndarray) -> np.ndarray:
    """Resizes one uint8 picture (H, W) to (16, 16).

    Pillow widens the filter with the reduction, so bicubic is antialiased here; it keeps thin strokes brighter than
    a box filter and, unlike Lanczos, hardly rings into the black background (which also costs file size).
    """
    return np.asarray(Image.fromarray(picture).resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def contact_sheet(images: np.ndarray, labels: np.ndarray, columns: int = 30, zoom: int = 3) -> Image.Image:
    """Draws the first `columns` pictures of each class, one class a row, to judge legibility by eye."""
    rows = [np.concatenate(images[labels == label][:columns], axis=1) for label in range(10)]
    sheet = Image.fromarray(np.concatenate(rows))
    return sheet.resize((sheet.width * zoom, sheet.height * zoom), Image.Resampling.NEAREST)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--source', type=Path, required=True,
                        help='npz with uint8 `images` (N, 28, 28), 0 is background, and uint8 `labels` (N,)')
    parser.add_argument('--output', type=Path, default=OUTPUT)
    parser.add_argument('--sheet', type=Path, help='also write a contact sheet (PNG) here')
    args = parser.parse_args()

    with np.load(args.source) as source:
        pictures, labels = source['images'], source['labels'].astype(np.uint8)
    images = np.stack([shrink(picture) for picture in pictures])
    args.output.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(args.output, images=images, labels=labels)
    print(f'{args.output}: {images.shape} {images.dtype}, {args.output.stat().st_size:,} bytes')
    if args.sheet:
        contact_sheet(images, labels).save(args.sheet)


if __name__ == '__main__':
    main()
