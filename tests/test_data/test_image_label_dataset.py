import numpy as np
import pytest
import torch
from mmengine.registry import DATASETS

from cdm_plugin.data import ImageLabelDataset

GRAY = np.random.default_rng(0).integers(0, 256, (6, 4, 5), dtype=np.uint8)
COLOUR = np.random.default_rng(1).integers(0, 256, (6, 4, 5, 3), dtype=np.uint8)
LABELS = np.array([3, 1, 4, 1, 5, 9])


def save(path, **arrays):
    np.savez_compressed(path, **arrays)
    return str(path)


def refused(path, message, error=ValueError):
    with pytest.raises(error, match=message) as info:
        ImageLabelDataset(data_file=str(path))
    assert '`data_file`' in str(info.value) and str(path) in str(info.value)


def test_gray_images(tmp_path):
    path = save(tmp_path / 'x.npz', images=GRAY, labels=LABELS)
    dataset = DATASETS.build(dict(type='ImageLabelDataset', data_file=path))
    sample = dataset[2]
    assert set(sample) == {'image', 'prompt'} and sample['prompt'] == 4 and type(sample['prompt']) is int
    assert sample['image'].shape == (1, 4, 5) and sample['image'].dtype == torch.float32
    # The usual uint8 rounding of an image in [-1, 1] takes it back.
    assert np.array_equal(((sample['image'] + 1) / 2 * 255).round().byte()[0].numpy(), GRAY[2])


def test_colour_images_become_channels_first(tmp_path):
    image = ImageLabelDataset(save(tmp_path / 'x.npz', images=COLOUR, labels=LABELS))[1]['image']
    assert image.shape == (3, 4, 5) and image.is_contiguous()
    assert torch.allclose(image[2, 3, 1], torch.tensor(float(COLOUR[1, 3, 1, 2])) / 255 * 2 - 1)


def test_range_is_minus_one_to_one(tmp_path):
    images = np.stack([np.zeros((2, 2), np.uint8), np.full((2, 2), 255, np.uint8)])
    dataset = ImageLabelDataset(save(tmp_path / 'x.npz', images=images, labels=np.array([0, 1])))
    assert (dataset[0]['image'] == -1).all() and (dataset[1]['image'] == 1).all()


def test_indices_take_a_split(tmp_path):
    path = save(tmp_path / 'x.npz', images=GRAY, labels=LABELS)
    head, tail = ImageLabelDataset(path, indices=4), ImageLabelDataset(path, indices=-2)
    assert [len(head), len(tail)] == [4, 2]
    assert [tail[i]['prompt'] for i in range(2)] == [5, 9]
    assert torch.equal(tail[0]['image'], ImageLabelDataset(path)[4]['image'])
    assert torch.equal(head.get_subset([3])[0]['image'], ImageLabelDataset(path)[3]['image'])


def test_categories_are_the_labels(tmp_path):
    dataset = ImageLabelDataset('x.npz', data_root=str(tmp_path), lazy_init=True)
    save(tmp_path / 'x.npz', images=GRAY, labels=LABELS.astype(np.uint8))
    dataset.full_init()
    assert [dataset.get_cat_ids(i) for i in range(6)] == [[3], [1], [4], [1], [5], [9]]


def test_the_digits_that_come_with_the_package():
    train = ImageLabelDataset('asset:digits/digits_16.npz', indices=9000)
    assert len(train) == 9000 and train[0]['image'].shape == (1, 16, 16) and train[0]['prompt'] in range(10)


def test_missing_file(tmp_path):
    refused(tmp_path / 'no.npz', 'does not exist', FileNotFoundError)


def test_damaged_files(tmp_path):
    save(tmp_path / 'x.npz', images=GRAY, labels=LABELS)
    whole = (tmp_path / 'x.npz').read_bytes()
    (tmp_path / 'cut.npz').write_bytes(whole[:-40])
    (tmp_path / 'text.npz').write_text('no zip at all')
    (tmp_path / 'empty.npz').write_bytes(b'')
    np.save(tmp_path / 'x.npy', GRAY)
    middle = len(whole) // 4
    (tmp_path / 'flipped.npz').write_bytes(whole[:middle] + bytes(b ^ 255 for b in whole[middle:middle + 8]) +
                                           whole[middle + 8:])
    for name in ('cut.npz', 'text.npz', 'empty.npz', 'x.npy', 'flipped.npz'):
        refused(tmp_path / name, 'damaged or not an .npz file')


@pytest.mark.parametrize('arrays, message', [
    (dict(x=GRAY, y=LABELS), r"needs the arrays images and labels, but has \['x', 'y'\]"),
    (dict(images=GRAY / 255, labels=LABELS), 'images must be uint8'),
    (dict(images=GRAY[0], labels=LABELS), 'images must be uint8, .*, but are uint8, .4, 5'),
    (dict(images=COLOUR.transpose(0, 3, 1, 2), labels=LABELS), 'images must be uint8, .N, H, W. or .N, H, W, C.'),
    (dict(images=GRAY, labels=LABELS / 2), 'labels must be integers'),
    (dict(images=GRAY, labels=np.eye(6, dtype=int)), 'labels must be integers, .N,., but are int64, .6, 6'),
    (dict(images=GRAY, labels=LABELS[:5]), '6 images, but 5 labels'),
    (dict(images=GRAY[:0], labels=LABELS[:0]), 'holds no images'),
])
def test_bad_arrays(tmp_path, arrays, message):
    refused(save(tmp_path / 'x.npz', **arrays), message)
