"""The latents of a dataset's pictures, which `cdm cache --latents` writes.

A folder holds shards, files like those of text embeddings with the field `latents`, (N, C, h, w), each of pictures of
one size, and `latents.json`, which says what encoded them and of which samples of the dataset each shard is.
"""
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.registry import DATASETS
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from cdm_plugin.assets import resolve
from cdm_plugin.codecs import Codec
from cdm_plugin.data.embeddings.files import (
    EmbeddingReader,
    check_shards,
    describe_shard,
    read_indexed_header,
    write_embeddings,
)
from cdm_plugin.data.sample import Sample, SampleError
from cdm_plugin.files import whole_file
from cdm_plugin.locks import held

INDEX = 'latents.json'
VERSION = 1
# Samples that are read again, to see whether their pictures are drawn.
READ_TWICE = 20
# How far apart, of their size, the latents of one picture may lie in two dtypes.
TOLERATED = 0.05


@DATASETS.register_module()
class LatentDataset(Dataset):
    """The samples of a dataset, each with the latents of its picture, `latents` (C, h, w), in the picture's place.

    Whatever else the samples hold stays (prompts, embeddings). `get_data_info` gives `height` and `width` of the
    pictures, for `BucketBatchSampler`.

    Args:
        dataset (dict): The dataset for which `cdm cache --latents` made them. Its pipeline need not read pictures any
            more.
        data_root (str): Their folder.

    Attributes:
        probe (dict): Of the codec that made them, see `probe`.

    Raises:
        FileNotFoundError: If the folder has no latents.
        ValueError: If the folder is unfinished or damaged, or made for a dataset of another length.
    """

    def __init__(self, dataset: dict[str, Any] | Dataset, data_root: str) -> None:
        self.dataset: Any = DATASETS.build(dataset) if isinstance(dataset, Mapping) else dataset
        self.full_init()
        self.root = Path(resolve(data_root))
        index = read_index(self.root)
        if index is None:
            raise FileNotFoundError(f'`data_root` {self.root} has no {INDEX}: make latents there with '
                                    '`cdm cache --latents`')
        self.probe = index['probe']
        self.rows: dict[int, tuple[str, int, str, tuple[int, int]]] = {}
        for entry in index['shards']:
            header, path = read_indexed_header(self.root, entry), str(self.root / entry['name'])
            size = tuple(index['scale'] * side for side in header.fields['latents'][0][1:])
            self.rows.update((sample, (path, row, prompt, size)) for row, (sample, prompt) in enumerate(
                zip(entry['samples'], header.prompts)))
        self._check_length(index['count'])
        self._reader = EmbeddingReader()

    def _check_length(self, count: int) -> None:
        if len(self.rows) != count:
            raise ValueError(f'`data_root` {self.root} is unfinished: it has {len(self.rows)} of {count} '
                             'pictures; run `cdm cache --latents` again, it completes the folder')
        if len(self.dataset) != count:
            raise ValueError(f'`data_root` {self.root} has latents of {count} pictures, but the dataset has '
                             f'{len(self.dataset)} samples: give the dataset that `cdm cache --latents` had')

    @property
    def metainfo(self) -> dict[str, Any]:
        """What MMEngine's wrappers ask of a dataset."""
        return getattr(self.dataset, 'metainfo', {})

    def full_init(self) -> None:
        """MMEngine's name for loading the dataset."""
        if hasattr(self.dataset, 'full_init'):
            self.dataset.full_init()

    def get_data_info(self, index: int) -> dict[str, int]:
        """Size of a sample's picture in pixels."""
        height, width = self.rows[index][3]
        return dict(height=height, width=width)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        path, row, prompt, _ = self.rows[index]
        sample = Sample(self.dataset[index])
        sample.pop('image', None)
        if str(sample.get('prompt', '')) != prompt:
            raise SampleError(f'latents {index} of {self.root} were made for {prompt[:80]!r}, but the dataset has '
                              f'{str(sample.get("prompt", ""))[:80]!r} there: give the dataset that '
                              '`cdm cache --latents` had')
        return Sample(sample, latents=self._reader.read(path, row)['latents'])


def probe(codec: Codec, channels: int) -> dict[str, Any]:
    """What a codec makes of one picture of so many channels: mean and deviation of its latents' channels, `values`. It
    tells codecs apart, wherever they lie and in whatever dtype they are."""
    ramp = torch.linspace(-1, 1, 4 * codec.scale, device=_device(codec))
    picture = torch.stack([ramp[:, None] * ramp.roll(7 * i)[None] for i in range(channels)])
    latents = codec.encode(picture[None])[0].float()
    return dict(channels=channels, values=[*latents.mean((1, 2)).tolist(), *latents.std((1, 2)).tolist()])


def _is_made_by(made: dict[str, Any], codec: Codec) -> bool:
    there, here = (torch.tensor(found['values']) for found in (made, probe(codec, made['channels'])))
    return there.shape == here.shape and bool((there - here).norm() <= TOLERATED * here.norm())


def _device(codec: Codec) -> torch.device:
    return next((p.device for p in codec.parameters()), torch.device('cpu'))


def check_latents(dataset: Any, codec: Codec) -> None:
    """Raises ValueError if cached latents in a dataset, or in those that it wraps, are of another codec."""
    for part in getattr(dataset, 'datasets', None) or [getattr(dataset, 'dataset', None)]:
        if part is not None:
            check_latents(part, codec)
    if isinstance(dataset, LatentDataset) and not _is_made_by(dataset.probe, codec):
        raise ValueError(f'another codec than model.backbone.codec made the latents in {dataset.root}: run '
                         '`cdm cache --latents` with this config into another folder')


def read_index(folder: str | Path) -> dict[str, Any] | None:
    """What `latents.json` says; None without one.

    Raises:
        ValueError: If it is damaged, of another version, or names a shard outside of the folder.
    """
    path = Path(folder, INDEX)
    if not path.is_file():
        return None
    try:
        index = json.loads(path.read_text(encoding='utf-8'))
        whole = {'version', 'count', 'scale', 'probe'} <= set(index) and all(e['samples'] for e in index['shards'])
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise ValueError(f'{path} is damaged: delete the folder and run `cdm cache --latents` again')
    if index['version'] != VERSION:
        raise ValueError(f'{path} has version {index["version"]!r}, but this cdm_plugin reads version {VERSION}: '
                         'update cdm_plugin, or make the folder again')
    check_shards(path, index['shards'])
    return index


def cache_latents(codec: Codec, dataset: Any, out: str, batch_size: int = 8, shard_size: int = 256,
                  dtype: str = 'float32') -> int:
    """Encodes every picture of a dataset once. The folder then serves `LatentDataset`. After a kill, the same call goes
    on behind the last finished shard.

    Args:
        codec (Codec): On the device where it is to run.
        dataset (Dataset): Its samples hold `image`, as a training has them.
        out (str): Folder to write; made if need be.
        batch_size (int): Pictures encoded at a time. Default 8.
        shard_size (int): Pictures a shard, whose latents are held in memory until it is full. Default 256.
        dtype (str): Of the latents in the files. Default 'float32', which a training on the pictures has too.

    Returns:
        int: Shards that an earlier run had finished.

    Raises:
        ValueError: If a sample has no picture or another one each time it is read, or the folder holds other latents or
            is in use.
    """
    folder = Path(out)
    with held(folder, 'cdm cache'):
        index = _open_index(folder, codec, dict(
            version=VERSION, count=len(dataset), dtype=dtype, shard_size=shard_size, scale=codec.scale,
            probe=probe(codec, len(_picture(dataset, 0)[0]))))
        done = {sample for entry in index['shards'] for sample in entry['samples']}
        reused = len(index['shards'])
        _check_not_drawn(dataset)
        with tqdm(total=len(dataset), initial=len(done), desc='encoding', unit='picture') as bar:
            waiting: dict[tuple[int, ...], _Shard] = {}
            for i in range(len(dataset)):
                if i in done:
                    continue
                image, prompt = _picture(dataset, i)
                shard = waiting.setdefault(tuple(image.shape), _Shard(codec, batch_size, getattr(torch, dtype)))
                shard.add(i, image, prompt)
                bar.update()
                if len(shard.samples) == shard_size:
                    waiting.pop(tuple(image.shape)).write(folder, index)
            for shard in waiting.values():
                shard.write(folder, index)
    return reused


class _Shard:
    """Latents of one size, until they are written."""

    def __init__(self, codec: Codec, batch_size: int, dtype: torch.dtype) -> None:
        self.codec, self.batch_size, self.dtype = codec, batch_size, dtype
        self.samples: list[int] = []
        self.prompts: list[str] = []
        self._images: list[Tensor] = []
        self._latents: list[Tensor] = []

    def add(self, sample: int, image: Tensor, prompt: str) -> None:
        self.samples.append(sample)
        self.prompts.append(prompt)
        self._images.append(image)
        if len(self._images) == self.batch_size:
            self._encode()

    def _encode(self) -> None:
        images = torch.stack(self._images).to(_device(self.codec))
        self._latents.append(self.codec.encode(images).to('cpu', self.dtype))
        self._images.clear()

    def write(self, folder: Path, index: dict[str, Any]) -> None:
        """Writes the shard, and enters it into the index of the folder."""
        if self._images:
            self._encode()
        names = {entry['name'] for entry in index['shards']}
        name = next(name for name in (f'{i:05d}.safetensors' for i in range(len(names) + 1)) if name not in names)
        write_embeddings(str(folder / name), dict(latents=torch.cat(self._latents)), self.prompts)
        index['shards'].append(dict(describe_shard(folder / name, self.prompts), samples=self.samples))
        with whole_file(folder / INDEX) as part:
            part.write_text(json.dumps(index, indent=1) + '\n', encoding='utf-8')


def _open_index(folder: Path, codec: Codec, wanted: dict[str, Any]) -> dict[str, Any]:
    """The index of an earlier run, with the shards that are whole, or a new one."""
    index = read_index(folder) or dict(wanted, shards=[])
    differences = [f'{key}: {index.get(key)!r} there, {value!r} here' for key, value in wanted.items()
                   if key != 'probe' and index.get(key) != value]
    differences += [] if _is_made_by(index['probe'], codec) else ['of another codec']
    if differences:
        raise ValueError(f'--out {folder} holds other latents ({"; ".join(differences)}): choose another folder or '
                         'delete it')
    whole = []
    for entry in index['shards']:
        try:
            read_indexed_header(folder, entry)
            whole.append(entry)
        except ValueError:  # missing or cut: it is made again
            pass
    return dict(index, shards=whole)


def _picture(dataset: Any, i: int) -> tuple[Tensor, str]:
    sample = dataset[i]
    image = sample.get('image') if isinstance(sample, Mapping) else None
    if not isinstance(image, Tensor) or not image.is_floating_point() or image.ndim != 3:
        raise ValueError(f'sample {i} of the dataset has no picture: name its field with the transform '
                         "dict(type='PackInputs', image=...)")
    return image, str(sample.get('prompt', ''))


def _check_not_drawn(dataset: Any) -> None:
    for i in range(min(len(dataset), READ_TWICE)):
        first, second = (_picture(dataset, i)[0] for _ in range(2))
        if first.shape != second.shape or not torch.equal(first, second):
            raise ValueError(f'the dataset draws its pictures: sample {i} is another one when it is read again, and '
                             "latents would be of one draw: leave random crops and flips out, crop='center' and flip=0 "
                             'of ResizeCrop')
