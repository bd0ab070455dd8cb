"""Batches of pictures of one size each."""
import random
import struct
import zlib
from collections import Counter

import numpy as np
import pytest
import torch
from acme_plugin import config
from mmengine.dataset import BaseDataset, DefaultSampler, InfiniteSampler
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, TRANSFORMS
from mmengine.runner import Runner
from PIL import Image, ImageFile, ImageOps
from tests_support import same_bits, tiny_backbone

from cdm_plugin.data import BucketBatchSampler, ResizeCrop, buckets, images
from cdm_plugin.data.images import read_image
from cdm_plugin.data.sample import SampleError
from cdm_plugin.sizes import nearest_size

SIZES = [8, (16, 8), (8, 16)]
# Height and width of the pictures, and the size that each belongs to.
PICTURES = [((20, 20), (8, 8))] * 7 + [((30, 14), (16, 8))] * 5 + [((9, 20), (8, 16))] * 4


class Sized(BaseDataset):
    def load_data_list(self):
        return [dict(height=size[0], width=size[1]) for size, _ in PICTURES]


def sampler(kind=InfiniteSampler, rank=0, world=1, monkeypatch=None, batch_size=2, seed=3, **kwargs):
    if monkeypatch is not None:
        monkeypatch.setattr(buckets, 'get_dist_info', lambda: (rank, world))
    return BucketBatchSampler(kind(Sized(), seed=seed, **kwargs), batch_size, SIZES)


def sizes_of(batch):
    return {PICTURES[i][1] for i in batch}


def take(batches, count):
    return [batch for batch, _ in zip(batches, range(count))]


@pytest.mark.parametrize('given, sizes, expected', [
    ((100, 100), [(8, 8), (16, 8)], (8, 8)), ((150, 100), [(8, 8), (16, 8)], (16, 8)),  # 1.41 lies between
    ((140, 100), [(8, 8), (16, 8)], (8, 8)), ((1000, 1000), [(512, 512), (1024, 1024)], (1024, 1024)),
    ((600, 600), [(1024, 1024), (512, 512)], (512, 512)), ((1, 1), [(16, 8)], (16, 8))])
def test_the_nearest_size(given, sizes, expected):
    assert nearest_size(*given, sizes) == expected


def test_every_sample_comes_as_often_as_any_other():
    rounds, seen, orders = 10, Counter(), []
    batches = take(sampler(), rounds * len(PICTURES) // 2)
    for batch in batches:
        assert len(batch) == 2 and len(sizes_of(batch)) == 1
        seen.update(batch)
    # Two of the buckets have an odd number of samples: one each may wait.
    assert set(seen) == set(range(len(PICTURES))) and max(seen.values()) - min(seen.values()) <= 1
    orders = {tuple(i for batch in batches[n * 8:(n + 1) * 8] for i in batch) for n in range(rounds)}
    assert len(orders) == rounds  # shuffled anew
    assert take(sampler(), 40) == take(sampler(), 40) != take(sampler(seed=4), 40)


@pytest.mark.parametrize('round_up, batches, missing', [(True, 9, 0), (False, 7, 2)])
def test_an_epoch(round_up, batches, missing):
    made = sampler(DefaultSampler, round_up=round_up)
    first = list(made)
    assert len(first) == len(made) == batches
    assert all(len(batch) == 2 and len(sizes_of(batch)) == 1 for batch in first)
    counts = Counter(i for batch in first for i in batch)
    assert len(counts) == len(PICTURES) - missing and sum(counts.values()) == 2 * batches
    made.sampler.set_epoch(1)
    assert list(made) != first == list(sampler(DefaultSampler, round_up=round_up))
    plain = sampler(DefaultSampler, round_up=False, shuffle=False)
    assert list(plain) == [[0, 1], [2, 3], [4, 5], [7, 8], [9, 10], [12, 13], [14, 15]]


@pytest.mark.parametrize('kind', [InfiniteSampler, DefaultSampler])
def test_ranks_have_one_size_an_iteration_and_other_samples(kind, monkeypatch):
    ranks = [take(sampler(kind, rank, 2, monkeypatch, batch_size=1), 7) for rank in range(2)]
    for one, other in zip(*ranks):
        assert sizes_of(one) == sizes_of(other) and one != other
    monkeypatch.undo()
    alone = take(sampler(kind), 7)
    assert [one + other for one, other in zip(*ranks)] == alone


def test_sizes_are_read_from_what_the_dataset_has(tmp_path):
    Image.new('RGB', (30, 20)).save(tmp_path / 'wide.png')
    turned = Image.Exif()
    turned[0x0112] = 6  # a camera held upright
    Image.new('RGB', (30, 20)).save(tmp_path / 'turned.jpg', exif=turned)
    for value, expected in (
            (tmp_path / 'wide.png', (20, 30)), (str(tmp_path / 'turned.jpg'), (30, 20)),
            (Image.open(tmp_path / 'turned.jpg'), (30, 20)), (np.zeros((20, 30, 3), np.uint8), (20, 30)),
            (torch.zeros(3, 20, 30), (20, 30))):
        assert buckets._size_of(dict(picture=value), 'picture') == expected
    (tmp_path / 'broken.png').write_text('<html>')
    with pytest.raises(SampleError, match='broken.png'):
        buckets._size_of(dict(picture=tmp_path / 'broken.png'), 'picture')
    with pytest.raises(SampleError, match=r"nor a picture in 'image', only \['picture'\]"):
        buckets._size_of(dict(picture=1), 'image')


@pytest.mark.parametrize('suffix', ['jpg', 'png', 'webp', 'tif', 'gif'])
@pytest.mark.parametrize('orientation', [None, 1, 3, 6, 8])
def test_a_size_is_that_of_the_picture_that_is_read_and_no_pixel_is_decoded(suffix, orientation, tmp_path, monkeypatch):
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    file = tmp_path / f'picture.{suffix}'
    Image.new('RGB', (30, 20)).save(file, exif=exif)
    expected = tuple(read_image(file).shape[1:])
    assert sorted(expected) == [20, 30]
    monkeypatch.setattr(ImageFile.ImageFile, 'load', lambda self: pytest.fail('pixels are decoded'))
    assert images.upright_size(file) == expected


@pytest.mark.parametrize('words', [b'<x tiff:Orientation="6"/>', None], ids=['XMP', 'EXIF'])
def test_what_stands_behind_a_pngs_pixels_counts(words, tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    chunk = b'eXIf' + turned.tobytes().removeprefix(b'Exif\0\0') if words is None else (
        b'iTXtXML:com.adobe.xmp' + bytes(5) + words)
    chunk = struct.pack('>I', len(chunk) - 4) + chunk + struct.pack('>I', zlib.crc32(chunk))
    Image.new('RGB', (30, 20)).save(tmp_path / 'plain.png')
    plain = (tmp_path / 'plain.png').read_bytes()
    (tmp_path / 'turned.png').write_bytes(plain[:-12] + chunk + plain[-12:])  # before IEND
    assert images.upright_size(tmp_path / 'plain.png') == (20, 30)
    assert images.upright_size(tmp_path / 'turned.png') == (30, 20) == read_image(tmp_path / 'turned.png').shape[1:]


def test_mistakes_are_named():
    with pytest.raises(ValueError, match='get_data_info'):
        BucketBatchSampler(InfiniteSampler([1, 2]), 2, SIZES)
    with pytest.raises(ValueError, match='no size has the 20 pictures'):
        sampler(DefaultSampler, batch_size=20, round_up=False)
    for sizes in ([], [(8, 8, 8)], 'big', [8.0], 0):
        with pytest.raises(ValueError, match='(sizes. of ResizeCrop|ResizeCrop.sizes).* must be'):
            ResizeCrop(sizes)
    with pytest.raises(SampleError, match='behind'):
        ResizeCrop(8)(dict(image='a.png'))


# Resizing


def smooth(height, width):
    y, x = np.mgrid[:height, :width] / max(height, width)
    return np.stack([255 * x, 255 * y, 127 + 127 * np.sin(6 * x + 4 * y)], -1).astype(np.uint8)


@pytest.mark.parametrize('given', [(64, 64), (60, 90), (120, 40), (16, 8), (10, 12)])
def test_pictures_are_resized_and_cropped_as_pillow_does_it(given):
    pixels = smooth(*given)
    made = ResizeCrop(SIZES)(dict(image=read_image(pixels)))['image']
    height, width = made.shape[1:]
    assert (height, width) == nearest_size(*given, [(8, 8), (16, 8), (8, 16)])
    expected = ImageOps.fit(Image.fromarray(pixels), (width, height), Image.Resampling.BICUBIC)
    # Pillow's box is a fraction of a pixel, here sides and crop are whole pixels.
    difference = (made - read_image(np.asarray(expected))).abs() * 127.5
    assert difference.mean() < 8
    if given[0] * width == given[1] * height:  # nothing is cropped
        assert difference.max() <= 1.01


def test_random_crops_and_flips():
    random.seed(0)
    image = torch.arange(3 * 8 * 20.0).view(3, 8, 20) / 500
    seen = {tuple(ResizeCrop(8, crop='random', flip=0.5)(dict(image=image))['image'][0, 0].tolist())
            for _ in range(400)}
    row = image[0, 0]
    assert seen == {tuple(part.tolist()) for i in range(13) for part in (row[i:i + 8], row[i:i + 8].flip(0))}


# A run


@TRANSFORMS.register_module()
class PromptAsLabel:
    def __call__(self, sample):
        return dict(sample, prompt=int(sample['prompt']))


@HOOKS.register_module()
class PictureSizesHook(Hook):
    def __init__(self):
        self.sizes = []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.sizes.append({tuple(image.shape[1:]) for image in data_batch['image']})


def test_a_run_over_pictures_of_several_sizes_resumes_to_the_bit(tmp_path):
    rows = ['prompt,image']
    for i, (size, _) in enumerate(PICTURES):
        Image.fromarray(smooth(*size)).save(tmp_path / f'{i}.png')
        rows.append(f'{i % 3},{i}.png')
    (tmp_path / 'rows.csv').write_text('\n'.join(rows))

    def run(name, iterations, resume=False):
        torch.manual_seed(0)
        cfg = config(tmp_path / name, iterations, resume)
        cfg.model = dict(type='FlowMatching', backbone=tiny_backbone(), image_size=SIZES)
        cfg.custom_hooks.append(dict(type='PictureSizesHook'))
        cfg.train_dataloader = dict(
            batch_size=2, num_workers=0, sampler=dict(type='InfiniteSampler', seed=1),
            batch_sampler=dict(type='BucketBatchSampler', sizes=SIZES),
            dataset=dict(type='PromptDataset', ann_file='rows.csv', data_root=str(tmp_path), data_prefix=dict(image=''),
                         pipeline=[dict(type='PromptAsLabel'), dict(type='PackInputs', image='image', channels=1),
                                   dict(type='ResizeCrop', sizes=SIZES)]))
        cfg.optim_wrapper = dict(constructor=cfg.optim_wrapper.constructor, student=cfg.optim_wrapper.student)
        runner = Runner.from_cfg(cfg)
        runner.train()
        (hook,) = [hook for hook in runner.hooks if isinstance(hook, PictureSizesHook)]
        return hook.sizes, torch.load(tmp_path / name / f'iter_{iterations}.pth', weights_only=True)

    sizes, whole = run('whole', 8)
    assert all(len(size) == 1 for size in sizes) and set.union(*sizes) == {(8, 8), (16, 8), (8, 16)}
    first, _ = run('parts', 4)
    rest, parts = run('parts', 8, resume=True)
    assert first + rest == sizes
    for part in ('state_dict', 'optimizer', 'student_ema'):
        same_bits(whole[part], parts[part], part)
