"""Pairs of noise and the teacher's sample of it, which `cdm pairs` writes.

A folder holds shards, files like those of text embeddings with the fields `noise` and `latents`, each (N, C, h, w), and
`pairs.json`, which says what made them and what each shard holds.
"""
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import all_gather_object, broadcast_object_list, get_dist_info
from mmengine.registry import DATASETS, DefaultScope
from torch.utils.data import Dataset, IterableDataset
from tqdm import tqdm

from cdm_plugin.assets import resolve
from cdm_plugin.data.captions import every_variant
from cdm_plugin.data.embeddings.files import (
    EmbeddingReader,
    describe_shard,
    load_index,
    read_indexed_header,
    write_embeddings,
    write_index,
)
from cdm_plugin.data.sample import Sample, SampleError
from cdm_plugin.registry import is_type
from cdm_plugin.sampling import step_sigmas
from cdm_plugin.secrets import without_secrets

INDEX = 'pairs.json'
VERSION = 1
# Samples that are read to see whether their prompts are drawn.
LOOKED_AT = 8


def read_index(folder: str | Path) -> dict[str, Any] | None:
    """What `pairs.json` says; None without one."""
    return load_index(Path(folder, INDEX), VERSION, ('count', 'shards'), 'cdm pairs')


@DATASETS.register_module()
class PairDataset(Dataset):
    """The samples of a dataset, each with its pair: `pair_noise` and `pair_latents`, (C, h, w).

    Pair i is of sample i; if there are more pairs than samples, these begin again. Whatever the samples hold stays
    (prompts, embeddings, pictures).

    Args:
        dataset (dict): The dataset for which `cdm pairs` made them.
        data_root (str): Their folder.

    Raises:
        FileNotFoundError: If the folder has no pairs.
        ValueError: If the folder is unfinished or damaged.
    """

    def __init__(self, dataset: dict[str, Any] | Dataset, data_root: str) -> None:
        self.dataset: Any = DATASETS.build(dataset) if isinstance(dataset, Mapping) else dataset
        root = Path(resolve(data_root))
        index = read_index(root)
        if index is None:
            raise FileNotFoundError(f'`data_root` {root} has no {INDEX}: make pairs there with `cdm pairs`')
        self.rows: list[tuple[str, int, str]] = []
        for entry in index['shards']:
            header = read_indexed_header(root, entry)
            self.rows += [(str(root / entry['name']), row, prompt) for row, prompt in enumerate(header.prompts)]
        if len(self.rows) != index['count']:
            raise ValueError(f'`data_root` {root} is unfinished: it has {len(self.rows)} of {index["count"]} pairs; '
                             'run `cdm pairs` again, it completes the folder')
        self._reader = EmbeddingReader()

    def full_init(self) -> None:
        """MMEngine's name for loading the dataset."""
        if hasattr(self.dataset, 'full_init'):
            self.dataset.full_init()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        path, row, prompt = self.rows[index]
        sample = Sample(self.dataset[index % len(self.dataset)])
        if str(sample.get('prompt', '')) != prompt:
            raise SampleError(f'pair {index} of {Path(path).parent} was made for {prompt[:80]!r}, but the dataset has '
                              f'{str(sample.get("prompt", ""))[:80]!r} there: give the dataset that `cdm pairs` had')
        pair = self._reader.read(path, row)
        return Sample(sample, pair_noise=pair['noise'], pair_latents=pair['latents'])


def dataset_of(cfg: Any, key: str) -> Any:
    """The dataset at a key of a config; of a PairDataset, the one inside."""
    found = cfg
    for part in key.split('.'):
        found = found.get(part) if hasattr(found, 'get') else None
    if found is None:
        raise ValueError(f'the config has no {key!r}: it names the dataset whose prompts the teacher draws')
    found = found['dataset'] if is_type(found, PairDataset, DATASETS) else found
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope', 'mmengine')):
        dataset = DATASETS.build(found)
    if hasattr(dataset, 'full_init'):
        dataset.full_init()
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, '__len__') or not len(dataset):
        raise ValueError(f'{key} must have a length of 1 or more, so that pair i is of sample i')
    for i in range(min(LOOKED_AT, len(dataset))):
        if len(list(every_variant(lambda: dataset[i]))) > 1:
            raise ValueError(f'{key} draws its prompts, and a pair is of one: leave several captions, template and '
                             'dropout of PackInputs out')
    return dataset


def make_pairs(method: Any, dataset: Any, out: str, index: dict[str, Any], batch_size: int) -> int:
    """Writes the shards of pairs that a folder lacks; the processes of a run share them, one after the other.

    Args:
        method (Distillation): With its teacher.
        dataset (Dataset): Pair i is of sample i modulo its length.
        out (str): The folder.
        index (dict): What makes the pairs: `count`, `shard_size`, `seed`, `steps`, `guidance_scale`, ...
        batch_size (int): Samples of one batch.

    Returns:
        int: How many shards were there.

    Raises:
        ValueError: If the folder holds other pairs.
    """
    index = without_secrets(dict(version=VERSION, **index))  # another token makes the same pairs
    folder, index = Path(out), json.loads(json.dumps(index, default=str))
    old = read_index(folder) or dict(index, shards=[])
    differences = [f'{key}: {old.get(key)!r} there, {value!r} here' for key, value in index.items()
                   if old.get(key) != value]
    if differences:
        raise ValueError(f'--out {out} holds other pairs ({"; ".join(differences)}): choose another folder or delete '
                         'it')
    starts = range(0, index['count'], index['shard_size'])
    names = [f'{i:0{max(5, len(str(len(starts))))}d}.safetensors' for i in range(len(starts))]
    done = {}
    for entry in old['shards']:
        try:
            read_indexed_header(folder, entry)
            done[entry['name']] = entry
        except ValueError:  # missing or cut: it is made again
            pass
    found = [done]
    broadcast_object_list(found)  # one that came later would find shards of the others there, and share other work
    done = found[0]
    reused, (rank, world_size) = len(done), get_dist_info()
    absent = [(name, start) for name, start in zip(names, starts) if name not in done]
    with tqdm(total=len(starts), initial=reused, desc='drawing', unit='shard', disable=rank > 0) as bar:
        for i in range(0, len(absent), world_size):
            entries = []
            for name, start in absent[i:i + world_size][rank:rank + 1]:
                numbers = range(start, min(start + index['shard_size'], index['count']))
                prompts = write_shard(folder / name, method, dataset, numbers, index, batch_size)
                entries.append(describe_shard(folder / name, prompts))
            together = [entry for part in all_gather_object(entries) for entry in part]
            done.update({entry['name']: entry for entry in together})
            if rank == 0:
                write_index(folder, dict(index, shards=[done[name] for name in sorted(done)]), INDEX)
            bar.update(len(together))
    return reused


def write_shard(path: Path, method: Any, dataset: Any, numbers: range, index: dict[str, Any],
                batch_size: int) -> list[str]:
    """Draws the pairs of these numbers into a file; their prompts."""
    noises, latents, prompts = [], [], []
    for start in range(numbers.start, numbers.stop, batch_size):
        part = range(start, min(start + batch_size, numbers.stop))
        samples = [dataset[i % len(dataset)] for i in part]
        noise = method.noise(index['seed'], part)
        condition = method.backbone.condition(method.data_preprocessor(samples, False))
        latents.append(method.sample_latents(condition, noise, sigmas=step_sigmas(index['steps']), role='teacher',
                                             guidance_scale=index['guidance_scale']).float().cpu())
        noises.append(noise)
        prompts += [str(sample.get('prompt', '')) for sample in samples]
    write_embeddings(str(path), dict(noise=torch.cat(noises), latents=torch.cat(latents)), prompts)
    return prompts
