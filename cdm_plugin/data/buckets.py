"""Pictures of several sizes in one run: each batch has one, chosen by the pictures' aspect ratios."""
import itertools
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from mmengine.dataset import InfiniteSampler
from mmengine.dist import get_dist_info
from mmengine.registry import DATA_SAMPLERS, TRANSFORMS
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import Sampler

from cdm_plugin.data.bad_records import SkipBadRecords, skipping_datasets
from cdm_plugin.data.images import upright_size
from cdm_plugin.data.mix import MixSampler
from cdm_plugin.data.sample import SampleError
from cdm_plugin.sizes import Pair, Size, image_sizes, nearest_size


@TRANSFORMS.register_module()
class ResizeCrop:
    """Brings a picture to a size: shrunk or enlarged until it covers it, then cropped. It stands behind `PackInputs`.

    Args:
        sizes (int, tuple or list): Pixels, as `model.image_size`; of several sizes `nearest_size`.
        crop (str): 'center', or 'random' along the side that is longer than the size. Default 'center'.
        flip (float): Probability of a horizontal flip, in [0, 1]. Default 0.
    """

    def __init__(self, sizes: Size | Sequence[Size], crop: str = 'center',
                 flip: float = 0.0) -> None:
        if crop not in ('center', 'random'):
            raise ValueError(f"`crop` of ResizeCrop must be 'center' or 'random', but is {crop!r}")
        if not 0 <= flip <= 1:
            raise ValueError(f'`flip` of ResizeCrop must lie in [0, 1], but is {flip!r}')
        self.sizes, self.crop, self.flip = image_sizes(sizes, '`sizes` of ResizeCrop'), crop, flip

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        """Replaces `image`, (C, H, W), float, in [-1, 1].

        Raises:
            SampleError: If there is none.
        """
        image = sample.get('image')
        if not isinstance(image, Tensor) or not image.is_floating_point() or image.ndim != 3:
            raise SampleError('ResizeCrop needs `image` as a float tensor (C, H, W): put it behind '
                              "dict(type='PackInputs', image=...) in the dataset's pipeline")
        sample['image'] = self._fit(image)
        return sample

    def _fit(self, image: Tensor) -> Tensor:
        given = height, width = image.shape[1], image.shape[2]
        wanted = nearest_size(height, width, self.sizes)
        factor = max(new / old for new, old in zip(wanted, given))
        scaled = [max(new, round(factor * old)) for new, old in zip(wanted, given)]
        if scaled != list(given):
            image = interpolate(image[None], size=scaled, mode='bicubic', antialias=True)[0].clamp(-1, 1)
        for dim, (old, new) in enumerate(zip(scaled, wanted), start=1):
            start = random.randint(0, old - new) if self.crop == 'random' else (old - new) // 2
            image = image.narrow(dim, start, new)
        return (image.flip(-1) if random.random() < self.flip else image).contiguous()


@DATA_SAMPLERS.register_module()
class BucketBatchSampler(Sampler):
    """Batches of one size each, for `train_dataloader.batch_sampler`, with `ResizeCrop` of the same sizes.

    The order is a function of the sampler's seed (and epoch) alone: every rank makes the same plan and takes its rows
    of each batch, so that the sizes of an iteration are equal on all ranks and a resumed run goes on as it would have.
    With `InfiniteSampler` every sample comes once before any comes twice, but for those that wait until their bucket
    fills a batch; with `DefaultSampler` once an epoch, the last batch of a bucket filled up with samples of its own
    (`round_up=True`) or left out. With `MixSampler` the draws of the mix come in their order, each in the next batch of
    its size: the sources keep their shares, give or take the draws that wait.

    Of a `SkipBadRecords`, pictures that cannot be opened are in no batch, and only a picture of the same size stands in
    for a bad one.

    Args:
        sampler (Sampler): Given by the runner; its own order is not used.
        batch_size (int): Samples of a batch on one rank; given by the runner.
        sizes (int, tuple or list): Pixels, as `model.image_size`.
        image (str): Field of the pictures in the dataset's `get_data_info`: paths, arrays or images. Where the fields
            `height` and `width` are there, no file is opened. Default 'image'.

    Raises:
        ValueError: If the dataset has no `get_data_info`, or no sizes of pictures, or fewer samples than a batch, or a
            `SkipBadRecords` inside of another wrapper.
    """

    def __init__(self, sampler: Sampler, batch_size: int, sizes: Size | Sequence[Size],
                 image: str = 'image') -> None:
        self.sampler = cast(Any, sampler)
        self.batch_size = batch_size
        self.rank, self.world_size = get_dist_info()
        self.sizes = image_sizes(sizes, 'train_dataloader.batch_sampler.sizes')
        dataset = self.sampler.dataset
        if not hasattr(dataset, 'get_data_info'):
            raise ValueError(f'BucketBatchSampler needs a dataset with get_data_info, as those of MMEngine have, but '
                             f'train_dataloader.dataset is a {type(dataset).__name__}')
        self.buckets: dict[Pair, list[int]] = {}
        self._bucket_of: list[dict[int, Pair]] = []  # by source of a mix
        for source in dataset.datasets if self.mixes else [dataset]:
            buckets = self._sort(source, image)
            self._bucket_of.append({row: size for size, rows in buckets.items() for row in rows})
            for size, rows in buckets.items():
                self.buckets.setdefault(size, []).extend(rows)
        if not self.infinite and not len(self):
            needed = batch_size * self.world_size
            raise ValueError(f'no size has the {needed} pictures that a batch of all ranks needs: '
                             f'train_dataloader.dataset has {self.counts}')

    def _sort(self, dataset: Any, image: str) -> dict[Pair, list[int]]:
        buckets: dict[Pair, list[int]] = {}
        skips = isinstance(dataset, SkipBadRecords)
        if skipping_datasets(dataset.dataset if skips else dataset):
            raise ValueError('with BucketBatchSampler, SkipBadRecords must stand around all other wrappers of '
                             'train_dataloader.dataset or, in a mix with MixSampler, of a source: in another wrapper '
                             'a picture of another size would stand in for a bad one')
        for i in range(len(dataset)):
            try:
                size = nearest_size(*_size_of(dataset.get_data_info(i), image), self.sizes)
            except SampleError as error:
                if not skips:
                    raise
                dataset.add(i, error)
            else:
                buckets.setdefault(size, []).append(i)
        if skips:
            dataset.replace_within(buckets.values())
        return buckets

    @property
    def mixes(self) -> bool:
        return isinstance(self.sampler, MixSampler)

    @property
    def infinite(self) -> bool:
        return isinstance(self.sampler, InfiniteSampler)

    @property
    def counts(self) -> dict[Pair, int]:
        """Samples by size."""
        return {size: len(rows) for size, rows in sorted(self.buckets.items())}

    def __len__(self) -> int:
        """Batches of an epoch."""
        step, up = self.batch_size * self.world_size, getattr(self.sampler, 'round_up', True)
        return sum(-(-len(rows) // step) if up else len(rows) // step for rows in self.buckets.values())

    def __iter__(self) -> Iterator[list[int]]:
        if self.mixes:
            yield from self._mixed()
        generator = torch.Generator().manual_seed(self.sampler.seed + getattr(self.sampler, 'epoch', 0))
        waiting: dict[Pair, list[int]] = {size: [] for size in self.buckets}
        while True:
            batches = self._full_batches(waiting, generator)
            if not self.infinite and getattr(self.sampler, 'round_up', True):
                batches += [self._filled(size, rows) for size, rows in waiting.items() if rows]
            for i in self._order(len(batches), generator):
                yield batches[i][self.rank::self.world_size]
            if not self.infinite:
                return

    def _mixed(self) -> Iterator[list[int]]:
        waiting: dict[Pair, list[int]] = {size: [] for size in self.buckets}
        for draw in itertools.count():
            source, row = self.sampler.dataset.locate(draw)
            size = self._bucket_of[source].get(row)
            if size is None:  # it cannot be opened
                continue
            waiting[size].append(draw)
            if len(waiting[size]) == self.batch_size * self.world_size:
                yield waiting[size][self.rank::self.world_size]
                waiting[size] = []

    def _order(self, count: int, generator: torch.Generator) -> list[int]:
        return torch.randperm(count, generator=generator).tolist() if self.sampler.shuffle else list(range(count))

    def _full_batches(self, waiting: dict[Pair, list[int]], generator: torch.Generator) -> list[list[int]]:
        """Batches of all ranks together; what fills none waits."""
        step, batches = self.batch_size * self.world_size, []
        for size, rows in self.buckets.items():
            queue = waiting[size] + [rows[i] for i in self._order(len(rows), generator)]
            full = len(queue) // step * step
            batches += [queue[start:start + step] for start in range(0, full, step)]
            waiting[size] = queue[full:]
        return batches

    def _filled(self, size: Pair, rows: list[int]) -> list[int]:
        step, own = self.batch_size * self.world_size, self.buckets[size]
        more = step - len(rows)
        return rows + (own * -(-more // len(own)))[:more]


def _size_of(info: dict[str, Any], image: str) -> Pair:
    """Height and width of a sample's picture, upright."""
    if 'height' in info and 'width' in info:
        return int(info['height']), int(info['width'])
    value = info.get(image)
    if isinstance(value, (str, Path)):
        return upright_size(value)
    if isinstance(value, Tensor):
        return value.shape[-2], value.shape[-1]
    if isinstance(value, np.ndarray):
        return value.shape[0], value.shape[1]
    if isinstance(value, Image.Image):
        width, height = ImageOps.exif_transpose(value).size
        return height, width
    raise SampleError(f'a sample has neither `height` and `width` nor a picture in {image!r}, only {sorted(info)}: '
                      'name its field in train_dataloader.batch_sampler.image')
