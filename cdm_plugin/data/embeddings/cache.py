"""Text embeddings of a whole dataset, computed once."""
import importlib.metadata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dataset import RepeatDataset
from mmengine.device import get_device
from mmengine.registry import DATASETS, MODELS, DefaultScope
from torch import Tensor
from tqdm import tqdm

from cdm_plugin.assets import resolve
from cdm_plugin.condition import MASK, Condition
from cdm_plugin.conditioners import EmbeddingConditioner
from cdm_plugin.data.captions import every_variant, is_encodable
from cdm_plugin.data.embeddings.dataset import EmbeddingDataset
from cdm_plugin.data.embeddings.files import (
    INDEX,
    INDEX_VERSION,
    NULL,
    Fields,
    describe_shard,
    hash_prompts,
    read_header,
    read_index,
    read_indexed_header,
    write_embeddings,
    write_index,
)
from cdm_plugin.data.embeddings.provenance import describe_difference, describe_encoder, index_differences
from cdm_plugin.data.mix import WeightedMixDataset
from cdm_plugin.data.stream import Stream
from cdm_plugin.files import clear_parts
from cdm_plugin.locks import held
from cdm_plugin.registry import is_type
from cdm_plugin.version import __version__

DTYPES = ('bfloat16', 'float16', 'float32')
# Samples that are read again, to see whether their prompts are drawn.
DRAWN_TWICE = 200
LIBRARIES = ('diffusers', 'transformers', 'tokenizers', 'torch')


@dataclass(frozen=True)
class CacheReport:
    """What `cache_embeddings` did.

    Attributes:
        folder (str): Where the embeddings lie.
        prompts (int): Distinct prompts in it.
        shards (int): Shards, without that of the null condition.
        reused_shards (int): Those of them that an earlier run had finished.
        bytes (int): Size of all shards, without that of the null condition.
        truncated (dict): Number of prompts whose end was cut off, by encoder; shards of earlier runs included. Empty
            too if the conditioner does not count them.
    """
    folder: str
    prompts: int
    shards: int
    reused_shards: int
    bytes: int
    truncated: dict[str, int] = field(default_factory=dict)


def cache_embeddings(cfg: Config, out: str, batch_size: int = 32, shard_size: int = 1024, dtype: str = 'bfloat16',
                     device: str | None = None, dataset: str = 'train_dataloader.dataset',
                     prompts: list[str] | None = None) -> CacheReport:
    """Encodes every prompt of a config's dataset once, with the conditioner of its backbone.

    The folder then serves `EmbeddingDataset` and `EmbeddingConditioner`: shards `00000.safetensors` and so on, with
    one row a distinct prompt, in the order in which they first occur, without the padding that a mask excludes;
    `null.safetensors`; and `index.json`, which says what they hold. After a kill, the same call goes on behind the last
    finished shard.

    Of a sample whose prompt is drawn by `PackInputs` (one of several captions, a template, the empty text) every
    prompt that may be drawn is encoded. A dataset that draws them by itself is refused: training would ask for prompts
    that were not drawn here. For those, write one caption a row.

    Args:
        cfg (Config): A training config, with `model.backbone` and the dataset.
        out (str): Folder to write; made if need be.
        batch_size (int): Prompts encoded at a time. Default 32.
        shard_size (int): Prompts a shard, which is held in memory until it is full. Default 1024.
        dtype (str): Of the embeddings in the files: 'bfloat16', 'float16' or 'float32'. Default 'bfloat16'.
        device (str, optional): Where the text encoders run. Default: MMEngine's choice.
        dataset (str): Key of the dataset in the config. Default 'train_dataloader.dataset'.
        prompts (list[str], optional): Distinct prompts in the place of the dataset's.

    Returns:
        CacheReport: What was done.

    Raises:
        ValueError: If an argument is out of range, `out` is a file, the dataset has no text prompts, the conditioner
            has no text encoders or gives NaN or infinity, or `out` holds embeddings that something else made (of other
            prompts, by another encoder, in another dtype or shard size) or is in use. One line that names the key or
            what differs.
    """
    for name, value in (('batch_size', batch_size), ('shard_size', shard_size)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f'{name} must be a whole number of 1 or more, but is {value!r}')
    if dtype not in DTYPES:
        raise ValueError(f'dtype must be one of {", ".join(DTYPES)}, but is {dtype!r}')
    backbone_cfg = _backbone_config(cfg)
    folder = Path(resolve(out))
    with held(folder, 'cdm cache'):
        return _cache(cfg, backbone_cfg, folder, batch_size, shard_size, dtype, device, dataset, prompts)


def _cache(cfg: Config, backbone_cfg: dict[str, Any], folder: Path, batch_size: int, shard_size: int, dtype: str,
           device: str | None, dataset: str, prompts: list[str] | None) -> CacheReport:
    """`cache_embeddings` in a folder that is this process's own."""
    clear_parts(folder)
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope', 'mmengine')):
        prompts = read_prompts(cfg, dataset) if prompts is None else prompts
        wanted = dict(version=INDEX_VERSION, prompts=dict(count=len(prompts), sha256=hash_prompts(prompts)),
                      shard_size=shard_size, dtype=dtype)
        index = _open_index(folder, wanted)  # before the text encoders are loaded, which takes minutes
        backbone = MODELS.build(backbone_cfg)
    conditioner = backbone.conditioner.to(device or get_device()).eval()
    encode = _Encoder(conditioner, getattr(torch, dtype))
    null = encode.null()
    wanted.update(describe_encoder(backbone, backbone_cfg), fields=_describe_fields(null))
    if index is None:
        index = dict(wanted, libraries=library_versions(), shards=[])
        folder.mkdir(parents=True, exist_ok=True)
        write_index(folder, index)
    else:
        _refuse(folder, index_differences(index, wanted))
    if not _is_null_condition(folder / NULL):
        write_embeddings(str(folder / NULL), null)
    reused = _write_shards(folder, index, prompts, encode, batch_size)
    truncated = sum((Counter(entry.get('truncated', {})) for entry in index['shards']), Counter())
    return CacheReport(str(folder), len(prompts), len(index['shards']), reused,
                       sum(entry['bytes'] for entry in index['shards']), dict(truncated))


def read_prompts(cfg: Config, key: str) -> list[str]:
    """The distinct prompts of a dataset, in the order in which they first occur.

    Args:
        cfg (Config): The config.
        key (str): Where the dataset stands in it, with dots.

    Returns:
        list[str]: At least one prompt.

    Raises:
        ValueError: If there is no such dataset, it has embeddings, class labels or no prompts, or no length.
    """
    dataset, _ = open_dataset(cfg, key)
    if isinstance(dataset, WeightedMixDataset):
        dataset = torch.utils.data.ConcatDataset(dataset.datasets)
    prompts = dict.fromkeys(_prompt(sample, key) for sample in tqdm(
        _every_sample(dataset, key), desc='reading prompts', unit='prompt', leave=False))
    if not prompts:
        raise ValueError(f'{key} holds no prompts')
    twice = (islice(_every_sample(dataset, key), DRAWN_TWICE) for _ in range(2))
    for i, (first, second) in enumerate(zip(*(map(_prompt, samples, repeat(key)) for samples in twice))):
        if first != second:
            raise ValueError(f'{key} draws its prompts: sample {i} is {_shorten(first)!r} once and '
                             f'{_shorten(second)!r} the next time, and training would ask for prompts that are not in '
                             'the cache: let PackInputs draw (a list of captions, template, dropout), whose prompts '
                             'are all encoded, or write one caption a row')
    return list(prompts)


def open_dataset(cfg: Config, key: str) -> tuple[Any, Any]:
    """A dataset of a config, without repetitions, and what the config says of it.

    Raises:
        ValueError: If there is no such dataset, or it has embeddings.
    """
    dataset_cfg: Any = cfg
    for part in key.split('.'):
        dataset_cfg = dataset_cfg.get(part) if isinstance(dataset_cfg, Mapping) or dataset_cfg is cfg else None
    if dataset_cfg is None:
        raise ValueError(f'the config has no {key!r}: it names the dataset whose prompts are encoded')
    for path in _find_type(dataset_cfg, EmbeddingDataset, key):
        raise ValueError(f'{path}.type is EmbeddingDataset, whose embeddings are there already: name a dataset of '
                         'prompts')
    try:
        dataset = DATASETS.build(dataset_cfg) if isinstance(dataset_cfg, Mapping) else dataset_cfg
        if hasattr(dataset, 'full_init'):  # as MMEngine's runner does
            dataset.full_init()
    except ValueError as error:
        if 'need at least one array to concatenate' in str(error):  # what MMEngine says of an empty dataset
            raise ValueError(f'{key} holds no prompts') from error
        raise
    while isinstance(dataset, RepeatDataset):
        dataset = dataset.dataset
    return dataset, dataset_cfg.to_dict() if hasattr(dataset_cfg, 'to_dict') else dataset_cfg


def _every_sample(dataset: Any, key: str) -> Iterator[Any]:
    """The samples of a dataset, each with every prompt that may be drawn for it."""
    if isinstance(dataset, Stream):
        yield from dataset.once(variants=True)
        return
    if not hasattr(dataset, '__len__'):
        raise ValueError(f'{key} is a stream without a length, which may never end: name a dataset with a length')
    for i in range(len(dataset)):
        yield from every_variant(lambda: dataset[i])


def _prompt(sample: Any, key: str) -> str:
    if isinstance(sample, Mapping) and 'condition' in sample:
        raise ValueError(f'{key} gives samples with embeddings (condition), which are there already: name a dataset '
                         'of prompts')
    if not isinstance(sample, Mapping) or 'prompt' not in sample:
        there = sorted(map(str, sample)) if isinstance(sample, Mapping) else f'a {type(sample).__name__}'
        raise ValueError(f"a sample of {key} has no 'prompt', only {there}: name the field of the prompts in its "
                         "pipeline, dict(type='PackInputs', prompt=...)")
    prompt = sample['prompt']
    if not isinstance(prompt, str):
        raise ValueError(f'{key} gives class labels as prompts ({prompt!r}), but only texts have embeddings to cache: '
                         'name a dataset of texts')
    if not is_encodable(prompt):
        raise ValueError(f'{key}: the prompt {prompt[:80]!r} holds half of a surrogate pair (a cut emoji), which no '
                         'tokenizer takes; mend it or delete the row')
    return prompt


def _find_type(value: Any, cls: type, path: str) -> Iterator[str]:
    if isinstance(value, Mapping):
        if is_type(value, cls):
            yield path
        for key, child in value.items():
            yield from _find_type(child, cls, f'{path}.{key}')
    elif isinstance(value, (list, tuple)):
        for i, child in enumerate(value):
            yield from _find_type(child, cls, f'{path}[{i}]')


def _backbone_config(cfg: Config) -> dict[str, Any]:
    backbone = (cfg.get('model') or {}).get('backbone')
    if not isinstance(backbone, Mapping):
        raise ValueError("the config has no 'model.backbone', whose text encoders encode the prompts")
    for path in _find_type(backbone.get('conditioner') or {}, EmbeddingConditioner, 'model.backbone.conditioner'):
        raise ValueError(f'{path}.type is EmbeddingConditioner, which has no text encoders: leave '
                         'model.backbone.conditioner out, or name that of the text encoders')
    return dict(backbone)


class _Encoder:
    """Prompts to embeddings in the dtype of the files, on the CPU; refuses what no training could use."""

    def __init__(self, conditioner: Any, dtype: torch.dtype) -> None:
        self.conditioner, self.dtype = conditioner, dtype

    @torch.no_grad()
    def null(self) -> Fields:
        """The null condition, each field (1, ...)."""
        return self._checked(self.conditioner.null(), ['the null condition'])

    @torch.no_grad()
    def __call__(self, prompts: list[str]) -> Fields:
        """The embeddings of B prompts, each field (B, ...) or, without the padding, a list of B rows."""
        return self._checked(self.conditioner.encode(prompts), [f'the prompt {_shorten(p)!r}' for p in prompts])

    def truncated(self) -> Counter:
        """How many prompts were cut so far, by encoder."""
        return Counter(getattr(self.conditioner, 'truncated', None) or {})

    def _checked(self, condition: Condition, names: list[str]) -> Fields:
        fields: dict[str, Any] = {
            name: self._check_field(name, tensor, names) for name, tensor in condition.fields.items()}
        for name in condition.masked:  # the padding of a batch is no part of a text
            fields[name] = [row[own.bool()] for row, own in zip(fields[name], fields.pop(name + MASK))]
        return fields

    def _check_field(self, name: str, tensor: Tensor, names: list[str]) -> Tensor:
        if len(tensor) != len(names):
            raise ValueError(f'{type(self.conditioner).__name__} (model.backbone.conditioner) gives {len(tensor)} rows '
                             f'of {name} for {len(names)} prompts')
        if not tensor.is_floating_point():  # masks, positions
            return tensor.cpu()
        row = _first_bad_row(tensor)
        if row is not None:
            raise ValueError(f'the text encoders give NaN or infinity in {name} for {names[row]}: half precision '
                             "overflows, set model.backbone.conditioner.dtype to 'bfloat16' or 'float32'")
        stored = tensor.to(self.dtype)
        row = _first_bad_row(stored)
        if row is not None:
            raise ValueError(f'{name} of {names[row]} is too large for the dtype of the files, '
                             f"{_dtype_name(stored)}: choose dtype 'bfloat16' or 'float32'")
        return stored.cpu()


def _first_bad_row(tensor: Tensor) -> int | None:
    good = torch.isfinite(tensor).flatten(1).all(1)
    return None if good.all() else int((~good).nonzero()[0])


def _write_shards(folder: Path, index: dict[str, Any], prompts: list[str], encode: _Encoder, batch_size: int) -> int:
    """Writes the shards that are not there, and enters each into the index. Returns how many there were."""
    size = index['shard_size']
    starts = range(0, len(prompts), size)
    # As wide as it takes: shards are read in the order of their names.
    width = max(5, len(str(len(starts) - 1)))
    parts = {f'{i:0{width}d}.safetensors': prompts[start:start + size] for i, start in enumerate(starts)}
    done = {entry['name']: entry for entry in index['shards'] if _is_complete(folder, entry, parts)}
    reused = len(done)
    rows = sum(entry['rows'] for entry in done.values())
    with tqdm(total=len(prompts), initial=rows, desc='encoding', unit='prompt') as bar:
        for name, part in parts.items():
            if name in done:
                continue
            before = encode.truncated()
            write_embeddings(str(folder / name), _encode_shard(encode, part, batch_size, index['fields'], bar.update),
                             part)
            entry = describe_shard(folder / name, part)
            cut = encode.truncated() - before
            done[name] = dict(entry, truncated=dict(cut)) if cut else entry
            index['shards'] = [done[name] for name in sorted(done)]
            write_index(folder, index)
    return reused


def _encode_shard(encode: _Encoder, prompts: list[str], batch_size: int, fields: Mapping[str, Any],
                  progress: Callable[[int], Any]) -> Fields:
    shard: dict[str, Tensor | list[Tensor]] = {}
    for start in range(0, len(prompts), batch_size):
        batch = encode(prompts[start:start + batch_size])
        found = _describe_fields(batch)
        if _without_lengths(found) != _without_lengths(fields):
            raise ValueError('model.backbone.conditioner gives other fields for the prompts than for the null '
                             f'condition ({found} instead of {dict(fields)}): only texts, (length, width), may have '
                             'lengths of their own')
        for name, rows in batch.items():
            # Filled batch by batch: to collect and concatenate would take the memory twice.
            kept = shard.setdefault(name, rows[0].new_empty((len(prompts), *fields[name]['shape'])))
            if isinstance(kept, Tensor) and isinstance(rows, Tensor) and rows.shape[1:] == kept.shape[1:]:
                kept[start:start + len(rows)] = rows
            else:
                shard[name] = [*kept[:start], *rows]
        progress(len(rows))
    return shard


def _is_complete(folder: Path, entry: Mapping[str, Any], parts: Mapping[str, list[str]]) -> bool:
    if entry['name'] not in parts or entry['sha256'] != hash_prompts(parts[entry['name']]):
        return False
    try:
        read_indexed_header(folder, entry)
    except ValueError:
        return False
    return True


def _is_null_condition(path: Path) -> bool:
    try:
        return path.is_file() and read_header(str(path)).rows == 1
    except ValueError:
        return False


def _open_index(folder: Path, wanted: Mapping[str, Any]) -> dict[str, Any] | None:
    """The index of an earlier run with the same prompts, dtype and shard size; None for a new folder."""
    if folder.is_file():
        raise ValueError(f'out={str(folder)!r} is a file: choose a folder')
    index = read_index(folder)
    if index is None:
        if any(folder.glob('*.safetensors')):
            raise ValueError(f'out={str(folder)!r} holds safetensors files, but no {INDEX} that says what they are: '
                             'choose another --out or delete it')
        return None
    differences = [describe_difference(key, index[key], wanted[key]) for key in ('dtype', 'shard_size')
                   if index[key] != wanted[key]]
    if index['prompts'] != wanted['prompts']:
        old, new = ('{count} (sha256 {sha256:.12})'.format(**part['prompts']) for part in (index, wanted))
        differences.append(f'prompts: {old} in the cache, {new} here')
    _refuse(folder, differences)
    return index


def _refuse(folder: Path, differences: list[str]) -> None:
    if differences:
        raise ValueError(f'out={str(folder)!r} holds embeddings that something else made ({"; ".join(differences)}): '
                         'choose another --out or delete it')


def _describe_fields(fields: Fields) -> dict[str, Any]:
    """Shape of the first sample and dtype, by field."""
    return {name: dict(shape=list(rows[0].shape), dtype=_dtype_name(rows[0])) for name, rows in fields.items()}


def _without_lengths(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The same, without the number of tokens in a text."""
    return {name: dict(field, shape=[None, *field['shape'][1:]] if len(field['shape']) > 1 else field['shape'])
            for name, field in fields.items()}


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).replace('torch.', '')


def _shorten(prompt: str) -> str:
    return prompt if len(prompt) <= 80 else f'{prompt[:80]}...'


def library_versions() -> dict[str, str]:
    versions = dict(cdm_plugin=__version__)
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    return versions
