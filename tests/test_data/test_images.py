"""The reader of pictures; expected pixels are those that were drawn."""
import numpy as np
import pytest
import torch
from mmengine.dataset import BaseDataset, pseudo_collate
from mmengine.logging import MMLogger
from mmengine.registry import MODELS
from picture_support import BROKEN, GRAY, NOISE, RAMP, RED, broken_pictures, good_pictures, square
from PIL import Image
from tests_support import tiny_backbone
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader

from cdm_plugin.data import PackInputs, images
from cdm_plugin.data.images import check_pictures, read_image
from cdm_plugin.data.sample import SampleError
from cdm_plugin.metrics import FID
from cdm_plugin.metrics.features import FeatureMetric


def to_pixels(image):
    """(H, W, C) in 0..255, not rounded."""
    return (image.double().permute(1, 2, 0).numpy() + 1) * 127.5


@pytest.fixture(scope='module')
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp('good')
    return folder, good_pictures(folder)


@pytest.fixture(scope='module')
def broken(tmp_path_factory):
    folder = tmp_path_factory.mktemp('broken')
    broken_pictures(folder)
    return folder


def test_every_kind_is_read_as_it_was_drawn(good):
    folder, expected = good
    for name, (pixels, off) in expected.items():
        image = read_image(folder / name)
        assert image.shape == (3, *pixels.shape[:2]) and image.dtype == torch.float32 and image.is_contiguous(), name
        assert image.min() >= -1 and image.max() <= 1, name
        assert np.abs(to_pixels(image) - pixels).max() <= off + 1e-4, name


def test_training_and_references_see_the_same(good, monkeypatch):
    """The folder as the reference of FID, whose judge is replaced; pictures differ in size."""
    folder, expected = good
    seen = []
    monkeypatch.setattr(FeatureMetric, 'load', lambda self: None)
    monkeypatch.setattr(FID, 'judge_all', lambda self, some, prompts: seen.extend(some) or torch.ones(len(some), 2))
    FID(reference=str(folder), device='cpu', batch_size=4).load()
    assert len(seen) == len(expected)
    for name, image in zip(sorted(expected), seen):
        packed = PackInputs(image='file')(dict(prompt='x', file=str(folder / name)))
        assert torch.equal(packed['image'], image), name


def test_one_channel_where_it_is_asked_for(good):
    folder, _ = good
    for name in ('gray.jpg', 'bilevel.png', 'gray16.png', 'la.png', 'ok.png'):
        assert read_image(folder / name, channels=1).shape[0] == 1
    # ITU-R 601: red weighs 0.299.
    assert to_pixels(read_image(square(RED, RED), channels=1)) == pytest.approx(255 * 0.299, abs=0.51)
    assert [len(read_image(folder / name, channels=None)) for name in ('gray.jpg', 'gray16.png', 'ok.png')] == [1, 1, 3]


def test_the_background_shows_through(good):
    folder, _ = good
    for name in ('rgba_cutout.png', 'rgba_black.png', 'palette_trns.png'):
        pixels = to_pixels(read_image(folder / name, background='#0000ff'))
        assert np.array_equal(pixels.round(), square(RED, (0, 0, 255))), name
    la = to_pixels(read_image(folder / 'la.png', background='blue')).round()
    assert np.array_equal(la, square(GRAY, (0, 0, 255)))
    packed = PackInputs(background='black')(dict(prompt='x', image=Image.open(folder / 'rgba_cutout.png')))
    assert np.array_equal(to_pixels(packed['image']).round(), square(RED, (0, 0, 0)))


@pytest.mark.parametrize('pixels, expected', [
    (NOISE, NOISE), (NOISE[..., ::-1], NOISE[..., ::-1]), (NOISE[..., 0], NOISE[..., :1].repeat(3, 2)),
    (NOISE[..., :1], NOISE[..., :1].repeat(3, 2)), (RAMP, RAMP[..., None].repeat(3, 2) / 257),
    (NOISE.astype(np.uint16) * 257, NOISE),
    (np.dstack([square(RED), square((255,) * 3, (0, 0, 0))[..., :1]]), square(RED)),
    (np.dstack([NOISE[:16, :16, :1], square((255,) * 3, (0, 0, 0))[..., :1]]),
     np.where(square((1,) * 3, (0, 0, 0)) == 1, NOISE[:16, :16, :1], 255)),
], ids=['rgb', 'strides', 'gray', 'gray, one channel', '16 bits', '16 bits, colour', 'alpha', 'gray and alpha'])
def test_arrays(pixels, expected):
    image = read_image(pixels)
    assert image.is_contiguous() and np.abs(to_pixels(image) - expected).max() < 1e-4


def test_eight_bits_are_exact():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert torch.equal(read_image(levels, channels=1)[0], torch.arange(256.).view(16, 16) / 127.5 - 1)


@pytest.mark.parametrize('name', BROKEN)
def test_what_cannot_be_read_is_one_line(broken, name):
    path = str(broken / name)
    for read in (read_image, lambda file: PackInputs(image='file')(dict(prompt='x', file=file))):
        with pytest.raises(SampleError) as info:
            read(path)
        assert path in str(info.value) and 'no readable image (' in str(info.value)
        assert '\n' not in str(info.value) and len(str(info.value)) < len(path) + 300


def test_reasons_are_named(broken):
    for name, reason in (('float.tif', 'mode F has 32 bits'), ('int32.tif', 'mode I has 32 bits'),
                         ('huge.png', '196000000 pixels'), ('cut.jpg', 'truncated'), ('html.jpg', 'no known format'),
                         ('lost.png', 'No such file')):
        with pytest.raises(SampleError, match=f'{name}.*{reason}'):
            read_image(broken / name)


def test_a_large_picture_is_read(tmp_path, monkeypatch):
    """Pillow warns from its limit on, and refuses from twice the limit on."""
    Image.fromarray(NOISE).save(tmp_path / 'x.png')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 64 * 64 - 1)
    with pytest.warns(Image.DecompressionBombWarning):
        assert np.array_equal(to_pixels(read_image(tmp_path / 'x.png')).round(), NOISE)


def test_an_animation_is_said_once(good, monkeypatch):
    folder, said = good[0], []
    monkeypatch.setattr(images, '_animated', [])
    monkeypatch.setattr(images, 'print_log', lambda text, *args, **kwargs: said.append(text))
    for name in ('ok.png', 'anim.gif', 'anim.webp', 'anim.gif'):
        read_image(folder / name)
    assert len(said) == 1 and 'anim.gif' in said[0] and 'first frame' in said[0]


class Files(BaseDataset):
    """A dataset of one's own."""

    def __init__(self, files, **kwargs):
        self.files = files
        super().__init__(pipeline=[PackInputs(image='file')], **kwargs)

    def load_data_list(self):
        return [dict(prompt='x', file=str(file)) for file in self.files]


@pytest.mark.parametrize('name', BROKEN)
def test_a_worker_says_the_same_line(broken, name):
    with pytest.raises(SampleError) as alone:
        read_image(broken / name)
    wrapped = ExceptionWrapper((alone.type, alone.value, alone.tb), 'in DataLoader worker process 0')
    with pytest.raises(SampleError) as info:
        wrapped.reraise()
    assert str(info.value) == str(alone.value)


@pytest.mark.parametrize('place', [0, 5], ids=['first batch', 'later'])
def test_a_real_worker_says_the_same_line(broken, good, place):
    files = [good[0] / 'ok.png'] * 8
    files[place] = broken / 'cut.jpg'
    with pytest.raises(SampleError) as alone:
        Files(files)[place]
    with pytest.raises(SampleError) as info:
        for _ in DataLoader(Files(files), batch_size=2, num_workers=1, collate_fn=pseudo_collate):
            pass
    assert str(info.value) == str(alone.value)


def backbone(scale=1):
    """A tiny one whose network takes latents of at most 8x8."""
    return MODELS.build({**tiny_backbone(), 'codec': dict(type='PixelCodec', scale=scale)})


@pytest.mark.parametrize('scale, shift, error', [
    (1, 0, None), (1.3, 0, None), (127.5, 127.5, r'lie in \[0, 255\]'), (2.2, 0.1, r'\[-2.1, 2.3\]')])
def test_pictures_of_another_range_are_found(scale, shift, error):
    pictures = [torch.linspace(-1, 1, 48).view(3, 4, 4) * scale + shift]
    if error is None:
        check_pictures(pictures, backbone(), [(4, 4)])
    else:
        with pytest.raises(ValueError, match=error):
            check_pictures(pictures, backbone(), [(4, 4)])


def test_pictures_in_0_to_1_or_of_another_size_are_warned_of(caplog):
    fine, coarse = backbone(), backbone(2)
    logger = MMLogger.get_instance('look')
    logger.addHandler(caplog.handler)
    good, wide = [torch.rand(3, 4, 4) * 2 - 1] * 3, torch.rand(3, 4, 8)
    check_pictures(good, fine, [(4, 4)])
    check_pictures([torch.zeros(3, 4, 4, dtype=torch.uint8), 'a path', None], fine, [(4, 4)])
    assert not caplog.messages
    check_pictures([wide, wide], coarse, [(2, 2)])
    assert len(caplog.messages) == 2
    assert 'none of 2 pictures' in caplog.messages[0] and '4x8 pixels' in caplog.messages[1]


@pytest.mark.parametrize('scale, size, words', [
    (4, (4, 6), '4x6 must be divisible by 4'), (2, (4, 20), r'image size \(4, 20\) .*multiples of 4 pixels up to 16')])
def test_pictures_that_codec_or_network_cannot_take_are_refused(scale, size, words):
    with pytest.raises(ValueError, match=f'^pictures of train_dataloader.dataset: .*{words}.*; .*ResizeCrop'):
        check_pictures([torch.zeros(3, *size)], backbone(scale), [(2, 2)])
