"""Trains the judge of the digits demo on the first 9,000 digits and tests it on the last 1,000.

    python benchmarks/train_digit_classifier.py

The number of epochs is fixed: no checkpoint is picked on the held-out digits.
"""
import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from cdm_plugin.metrics import DigitClassifier, class_accuracy, pixels_to_images

ASSETS = Path(__file__).parents[1] / 'cdm_plugin/assets/digits'
NUM_TRAIN = 9000


def augment(images: Tensor) -> Tensor:
    """Turns by up to 10 degrees, scales by up to 10% and moves by up to one pixel, each picture on its own."""
    count, _, size, _ = images.shape
    uniform = torch.rand(4, count) * 2 - 1
    angle, scale = uniform[0] * math.radians(10), 1 + 0.1 * uniform[1]
    cos, sin = scale * angle.cos(), scale * angle.sin()
    shift = uniform[2:] * 2 / size  # the grid runs from -1 to 1, so a pixel is 2 / size wide
    theta = torch.stack([torch.stack([cos, -sin, shift[0]], 1), torch.stack([sin, cos, shift[1]], 1)], 1)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    # grid_sample pads with 0, which is mid grey here: shift the background to 0 and back
    return F.grid_sample(images + 1, grid, align_corners=False) - 1


def train(images: Tensor, labels: Tensor, epochs: int, batch_size: int) -> DigitClassifier:
    classifier = DigitClassifier()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=3e-3, weight_decay=0.05)
    steps = epochs * (len(images) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    for epoch in range(epochs):
        for index in torch.randperm(len(images)).split(batch_size):
            loss = F.cross_entropy(classifier(augment(images[index])), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f'epoch {epoch + 1:2d}/{epochs}  loss of the last batch {loss.item():.4f}', flush=True)
    return classifier.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--digits', type=Path, default=ASSETS / 'digits_16.npz')
    parser.add_argument('--output', type=Path, default=ASSETS / 'classifier.safetensors')
    parser.add_argument('--epochs', type=int, default=20)
    parser.add_argument('--batch-size', type=int, default=100, help='must divide 9,000')
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    if NUM_TRAIN % args.batch_size:
        parser.error(f'--batch-size must divide {NUM_TRAIN}, got {args.batch_size}')

    with np.load(args.digits) as digits:
        images, labels = pixels_to_images(digits['images']), torch.from_numpy(digits['labels']).long()
    torch.manual_seed(args.seed)
    start = time.perf_counter()
    classifier = train(images[:NUM_TRAIN], labels[:NUM_TRAIN], args.epochs, args.batch_size)
    seconds = time.perf_counter() - start
    save_file(classifier.state_dict(), args.output)
    accuracy = class_accuracy(images[NUM_TRAIN:], labels[NUM_TRAIN:], classifier)
    print(f'{args.output}: {args.output.stat().st_size:,} bytes, trained in {seconds:.0f} s, '
          f'held-out accuracy {accuracy:.1%}')


if __name__ == '__main__':
    main()
