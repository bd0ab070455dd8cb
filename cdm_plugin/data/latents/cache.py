"""Latents of a whole dataset's pictures, computed once."""
import hashlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset
from tqdm import tqdm

from cdm_plugin.assets import resolve
from cdm_plugin.conditioners import Conditioner
from cdm_plugin.data.captions import every_variant
from cdm_plugin.data.embeddings.cache import DTYPES, library_versions, open_dataset
from cdm_plugin.data.embeddings.files import read_header, read_indexed_header, write_embeddings
from cdm_plugin.data.embeddings.provenance import codec_differences, describe_codec, describe_difference
from cdm_plugin.data.latents.files import (
    FOLDER,
    ROWS,
    VERSION,
    describe,
    parse_prompts,
    read_index,
    read_rows,
    write_index,
)
from cdm_plugin.data.mix import WeightedMixDataset
from cdm_plugin.draws import drawn_by
from cdm_plugin.errors import describe as describe_error
from cdm_plugin.files import clear_parts
from cdm_plugin.locks import held
from cdm_plugin.secrets import without_secrets
from cdm_plugin.sizes import image_sizes

Place = tuple[int, int]


@dataclass(frozen=True)
class LatentReport:
    """What `cache_latents` did.

    Attributes:
        folder (str): Where the cache lies; the latents are in its folder `latents`.
        rows (int): Latents in it: samples times views.
        shards (int): Files that they are in.
        reused_shards (int): Those of them that an earlier run had finished.
        bytes (int): Their size.
        sizes (dict): Number of latents by the pictures' height and width.
        prompts (list[str], optional): The distinct prompts in the order in which they first occur; None if the samples
            have class labels.
    """
    folder: str
    rows: int
    shards: int
    reused_shards: int
    bytes: int
    sizes: dict[tuple[int, int], int]
    prompts: list[str] | None


def cache_latents(cfg: Config, out: str, views: int = 1, seed: int = 0, dtype: str = 'float32', batch_size: int = 8,
                  shard_size: int = 256, workers: int = 0, device: str | None = None,
                  dataset: str = 'train_dataloader.dataset') -> LatentReport:
    """Encodes every picture of a config's dataset with the codec of its backbone, for `LatentDataset`.

    Pictures are those that the dataset's pipeline gives: resized, cropped, flipped. What it draws is a function of
    `seed`, sample and view alone, and each of the `views` of a sample is a row of its own. Encoded is what a training
    on the pictures would encode: of an autoencoder the posterior's mode, one picture at a time. In float32 the latents
    are the same bits.

    Of a sample whose prompt `PackInputs` draws, every prompt that may be drawn is kept.

    After a kill, the same call goes on behind the last finished shard.

    Args:
        cfg (Config): A training config, with `model.backbone` and the dataset.
        out (str): Folder to write; made if need be.
        views (int): Readings of each sample. Default 1.
        seed (int): Of what the pipeline draws. Default 0.
        dtype (str): Of the latents in the files: 'float32', 'bfloat16' or 'float16'. Default 'float32'.
        batch_size (int): Pictures encoded at a time. Default 8.
        shard_size (int): Latents a file; of each size so many wait in memory. Default 256.
        workers (int): Processes that read pictures. Default 0: this one does.
        device (str, optional): Where the codec runs. Default: MMEngine's choice.
        dataset (str): Key of the dataset in the config. Default 'train_dataloader.dataset'.

    Returns:
        LatentReport: What was done.

    Raises:
        ValueError: If an argument is out of range, the dataset has no pictures, none of several views differs, a
            picture has a size that `model.image_size` has not, or `out` holds other latents or is in use.
    """
    for name, value, least in (('views', views, 1), ('batch_size', batch_size, 1), ('shard_size', shard_size, 1),
                               ('workers', workers, 0)):
        if not isinstance(value, int) or value < least:
            raise ValueError(f'{name} must be a whole number of {least} or more, but is {value!r}')
    if dtype not in DTYPES:
        raise ValueError(f'dtype must be one of {", ".join(DTYPES)}, but is {dtype!r}')
    if not isinstance((cfg.get('model') or {}).get('backbone'), Mapping):
        raise ValueError("the config has no 'model.backbone', whose codec encodes the pictures")
    root = Path(resolve(out))
    with held(root, 'cdm cache'), DefaultScope.overwrite_default_scope(cfg.get('default_scope', 'mmengine')):
        source, source_cfg = open_dataset(cfg, dataset)
        if isinstance(source, IterableDataset) or not hasattr(source, '__len__'):
            raise ValueError(f'{dataset} is a stream without a length, whose samples have no numbers: name a dataset '
                             'with a length')
        if isinstance(source, WeightedMixDataset):
            raise ValueError(f'{dataset} is a mix, whose proportions are no matter of a cache: cache each source by '
                             f'itself, --dataset {dataset}.sources.{source.names[0]}.dataset')
        if isinstance(source, IterableDataset) or not hasattr(source, '__len__') or not len(source):
            raise ValueError(f'{dataset} must have a length of 1 or more, so that latent i is of sample i')
        # A conditioner without weights: texts are none of this function's business.
        backbone = MODELS.build({**cfg.model.backbone, 'conditioner': Conditioner()})
        sizes = image_sizes(cfg.model['image_size'], 'model.image_size') if cfg.model.get('image_size') else [
            tuple(side * backbone.codec.scale for side in backbone.default_latent_size())]
        plain = without_secrets(source_cfg) if isinstance(source_cfg, dict) else type(source).__name__
        index = json.loads(json.dumps(dict(
            version=VERSION, samples=len(source), views=views, seed=seed, dtype=dtype, shard_size=shard_size,
            scale=backbone.codec.scale, dataset=plain, rows=_digest_rows(source),
            **describe_codec(backbone.codec, backbone.load_kwargs)),
            default=str))
        job = _Job(root / FOLDER, source, dataset, index, sizes, backbone.codec.to(device or get_device()).eval())
        reused = job.open()
        job.encode(batch_size, workers)
        return job.report(root, reused)


class _Views(Dataset):
    """Samples by (number, view), each with what its pipeline draws for that."""

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, place: Place) -> tuple[Place, Any, list[Any]]:
        """The place, the sample, and all prompts that may be drawn for it."""
        def read() -> Any:
            with drawn_by(self.seed, *place):
                return self.dataset[place[0]]

        samples = list(every_variant(read))
        prompts = dict.fromkeys(sample['prompt'] for sample in samples if isinstance(sample, Mapping)
                                and sample.get('prompt') is not None)
        return place, samples[0], list(prompts)


class _Job:
    """One folder of latents: what of it is there, and the rest."""

    def __init__(self, folder: Path, source: Any, key: str, index: dict[str, Any], sizes: list[tuple[int, int]],
                 codec: Any) -> None:
        self.folder, self.key, self.index, self.sizes, self.codec = folder, key, index, sizes, codec
        self.views = _Views(source, index['seed'])
        self.done: dict[Place, None] = {}
        self.waiting: dict[tuple[int, int], list[tuple[Place, str, Tensor]]] = {}  # pictures, by size
        self.encoded: dict[tuple[int, int], list[tuple[Place, str, int, Tensor]]] = {}  # their latents

    def open(self) -> int:
        """Takes over the shards of an earlier run; returns how many. Knows whether prompts are labels."""
        samples = [self._sample(*self.views[0, view]) for view in range(self.index['views'])]
        self.index['labels'] = not isinstance(samples[0][1][0], str)
        self._check_views()
        old = read_index(self.folder) if self.folder.is_dir() else None
        if old is None:
            if any(self.folder.glob('*.safetensors')):
                raise ValueError(f'{self.folder} holds safetensors files, but no index that says what they are: choose '
                                 'another --out or delete it')
            self.index.update(libraries=library_versions(), shards=[])
            write_index(self.folder, self.index)
            return 0
        clear_parts(self.folder)
        differences = [describe_difference(key, old.get(key), value) for key, value in self.index.items()
                       if key not in ('codec', 'source') and old.get(key) != value]
        differences += codec_differences(old, self.index)
        if differences:
            raise ValueError(f'{self.folder} holds latents that something else made ({"; ".join(differences)}): choose '
                             'another --out or delete it')
        self.index = dict(old, shards=[entry for entry in old['shards'] if self._is_complete(entry)])
        return len(self.index['shards'])

    def _check_views(self) -> None:
        """Several views must not all be one."""
        count = self.index['views']
        for number in range(min(8, self.index['samples'])) if count > 1 else ():
            pictures = [self._sample(*self.views[number, view])[2] for view in range(count)]
            if any(not torch.equal(pictures[0], other) for other in pictures[1:]):
                return
        if count > 1:
            raise ValueError(f"the {count} views of a sample of {self.key} are all the same picture: let its pipeline "
                             "draw, dict(type='ResizeCrop', crop='random', flip=0.5), or leave --views out")

    def _is_complete(self, entry: Mapping[str, Any]) -> bool:
        path = self.folder / entry['name']
        try:
            read_indexed_header(self.folder, entry)
        except ValueError:  # missing or cut: its rows are made again
            return False
        rows = read_rows(path)
        number, view, checksum = rows[0]
        if number >= self.index['samples'] or _checksum(self._sample(*self.views[number, view])[2]) != checksum:
            raise ValueError(f'{self.folder} holds latents of other pictures: sample {number} of {self.key} has '
                             'changed since; choose another --out or delete it')
        self.done.update({(number, view): None for number, view, _ in rows})
        return True

    def _sample(self, place: Place, sample: Any, prompts: list[Any]) -> tuple[Place, list[Any], Tensor]:
        """Prompts and picture of a sample.

        Raises:
            ValueError: If it has none, or one of another size.
        """
        image = sample.get('image') if isinstance(sample, Mapping) else None
        if not isinstance(image, Tensor) or not image.is_floating_point() or image.ndim != 3:
            raise ValueError(f'{self.key} gives samples without pictures: name their field in its pipeline, '
                             "dict(type='PackInputs', image=...)")
        size = tuple(image.shape[1:])
        if size not in self.sizes:
            known = ', '.join(f'{height}x{width}' for height, width in self.sizes)
            raise ValueError(f'sample {place[0]} of {self.key} has {size[0]}x{size[1]} pixels, which model.image_size '
                             f"({known}) has not: put dict(type='ResizeCrop', sizes=...) behind PackInputs")
        if not prompts:
            raise ValueError(f'{self.key} gives samples without prompts: name their field in its pipeline, '
                             "dict(type='PackInputs', prompt=...)")
        return place, prompts, image.contiguous()

    def encode(self, batch_size: int, workers: int) -> None:
        """Encodes and writes what is not there."""
        places = [(i, view) for i in range(self.index['samples']) for view in range(self.index['views'])]
        places = [place for place in places if place not in self.done]
        loader = DataLoader(self.views, batch_size=None, sampler=places, num_workers=workers)
        with tqdm(total=len(places) + len(self.done), initial=len(self.done), desc='encoding', unit='picture') as bar:
            for place, sample, prompts in loader:
                place, prompts, image = self._sample(tuple(place), sample, prompts)
                size = (image.shape[1], image.shape[2])
                waiting = self.waiting.setdefault(size, [])
                prompts = [int(prompt) for prompt in prompts] if self.index['labels'] else prompts
                waiting.append((place, json.dumps(prompts, ensure_ascii=False), image))
                full = len(waiting) + len(self.encoded.get(size, ())) == self.index['shard_size']
                if full or len(waiting) == batch_size:
                    self._encode(size)
                if full:
                    self._write(size)
                bar.update()
            for size in sorted(self.waiting):
                self._encode(size)
                self._write(size)

    @torch.no_grad()
    def _encode(self, size: tuple[int, int]) -> None:
        waiting, self.waiting[size] = self.waiting[size], []
        if waiting:
            device = next((t.device for t in (*self.codec.parameters(), *self.codec.buffers())), 'cpu')
            latents = self.codec.encode(torch.stack([image for *_, image in waiting]).float().to(device))
            stored = latents.to(getattr(torch, self.index['dtype'])).cpu()
            self.encoded.setdefault(size, []).extend(
                (place, prompt, _checksum(image), row) for (place, prompt, image), row in zip(waiting, stored))

    def _write(self, size: tuple[int, int]) -> None:
        rows = self.encoded.pop(size, [])
        if not rows:
            return
        taken = {entry['name'] for entry in self.index['shards']}
        stem = f'{size[0]}x{size[1]}'
        name = next(name for i in range(len(taken) + 1) if (name := f'{stem}-{i:05d}.safetensors') not in taken)
        ids = torch.tensor([[*place, checksum] for place, _, checksum, _ in rows])
        prompts, latents = [prompt for _, prompt, _, _ in rows], torch.stack([row for *_, row in rows])
        write_embeddings(str(self.folder / name), dict(latents=latents, **{ROWS: ids}), prompts)
        entry = describe(self.folder / name, prompts, latents.shape[-2:])
        self.index['shards'] = sorted([*self.index['shards'], entry], key=lambda entry: entry['name'])
        write_index(self.folder, self.index)

    def report(self, root: Path, reused: int) -> LatentReport:
        """What there is now."""
        sizes: dict[tuple[int, int], int] = {}
        prompts: dict[Place, list[Any]] = {}
        for entry in self.index['shards']:
            size = tuple(side * self.index['scale'] for side in entry['size'])
            sizes[size] = sizes.get(size, 0) + entry['rows']
            path = self.folder / entry['name']
            prompts.update({(number, view): parse_prompts(text, path) for (number, view, _), text in zip(
                read_rows(path), read_header(str(path)).prompts or ())})
        distinct = None if self.index['labels'] else list(dict.fromkeys(
            prompt for place in sorted(prompts) for prompt in prompts[place]))
        weight = sum(entry['bytes'] for entry in self.index['shards'])
        return LatentReport(str(root), len(prompts), len(self.index['shards']), reused, weight, sizes, distinct)


def _digest_rows(dataset: Any) -> str:
    """A digest of what a dataset says of its samples, captions above all, before pictures are read."""
    digest = hashlib.sha256()
    for i in range(len(dataset)) if hasattr(dataset, 'get_data_info') else ():
        try:
            row = dataset.get_data_info(i)
        except Exception as error:  # of a bad record, which is met again when it is read
            row = describe_error(error)
        digest.update(json.dumps(row, skipkeys=True, default=lambda value: type(value).__name__).encode())
    return digest.hexdigest()[:16]


def _checksum(image: Tensor) -> int:
    """CRC-32 of a picture's pixels, (C, H, W), as float32."""
    return zlib.crc32(image.float().numpy().tobytes())
