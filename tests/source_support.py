"""The same few captioned pictures, laid down as each source has them."""
import io
import json
import tarfile

import numpy as np
from PIL import Image

SIDE = 8


def picture(i):
    """One whose first pixel is (20 i, 0, 0)."""
    return Image.fromarray(np.full((SIDE, SIDE, 3), (20 * i, 0, 0), np.uint8))


def content(i):
    """A PNG file of it."""
    file = io.BytesIO()
    picture(i).save(file, 'PNG')
    return file.getvalue()


def number(image):
    """Which picture a sample's `image` is."""
    assert image.shape == (3, SIDE, SIDE) and (image[1:] == -1).all()
    return round(float((image[0, 0, 0] + 1) * 127.5) / 20)


def write_tar(path, samples):
    """A tar of `{file name: content}`."""
    with tarfile.open(path, 'w') as tar:
        for name, data in samples.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_tars(folder, lengths):
    """Tars of pictures 0, 1, ... with their captions `picture i`."""
    start = 0
    for shard, length in enumerate(lengths):
        files = {}
        for i in range(start, start + length):
            files.update({f'{i:04d}.png': content(i), f'{i:04d}.txt': f'picture {i}\n'.encode(),
                          f'{i:04d}.json': json.dumps(dict(meta=dict(captions=[f'a{i}', f'b{i}']))).encode()})
        write_tar(folder / f'{shard:03d}.tar', files)
        start += length
    return folder


def write_rows(folder, lengths):
    """Parquet files of the same, with class labels and nested captions."""
    import datasets
    features = datasets.Features(dict(
        image=datasets.Image(), prompt=datasets.Value('string'), label=datasets.ClassLabel(names=['cat', 'dog']),
        meta=dict(captions=datasets.Sequence(datasets.Value('string')))))
    numbers = range(sum(lengths))
    whole = datasets.Dataset.from_dict(dict(
        image=[dict(bytes=content(i), path=None) for i in numbers], prompt=[f'picture {i}' for i in numbers],
        label=[i % 2 for i in numbers], meta=[dict(captions=[f'a{i}', f'b{i}']) for i in numbers]), features=features)
    start = 0
    for shard, length in enumerate(lengths):
        whole.select(range(start, start + length)).to_parquet(str(folder / f'{shard}.parquet'))
        start += length
    return whole
