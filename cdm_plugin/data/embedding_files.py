"""Files of cached text embeddings.

A shard is a safetensors file whose tensors are the fields of the condition (`encoder_hidden_states` (N, L, D),
`pooled_projections` (N, P), ...), one row a sample; its metadata may hold the prompts, under `prompts`, as a JSON list.
A folder that `cdm cache` made has an index beside its shards, which says what they hold and who encoded it.
"""
import hashlib
import json
import os
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

NULL = 'null.safetensors'
INDEX = 'index.json'
INDEX_VERSION = 1
INDEX_KEYS = ('prompts', 'shard_size', 'dtype', 'encoder', 'source', 'fields', 'shards')


class ShardHeader(NamedTuple):
    """What a shard holds.

    Attributes:
        fields (dict): Shape of one sample, and dtype, by field.
        rows (int): Number of samples N.
        prompts (list[str], optional): The prompts, or None if the shard does not say.
    """
    fields: Dict[str, Tuple[Tuple[int, ...], str]]
    rows: int
    prompts: Optional[List[str]]


def write_embeddings(path: str, fields: Dict[str, Tensor], prompts: Optional[List[str]] = None) -> None:
    """Writes one shard. A run that is killed meanwhile leaves no half of it under this name.

    Args:
        path (str): File to write, `*.safetensors`; its folder is made.
        fields (dict): Tensors by field, each (N, ...).
        prompts (list[str], optional): The N prompts. Default None.

    Raises:
        ValueError: If the suffix is another one, there is no field, or the numbers of rows differ.
    """
    target = Path(path)
    if target.suffix != '.safetensors':
        raise ValueError(f'path {path} must end in .safetensors')
    rows = {name: len(field) if field.ndim else 0 for name, field in fields.items()}
    if prompts is not None:
        rows['prompts'] = len(prompts)
    if not fields or len(set(rows.values())) != 1:
        raise ValueError(f'embeddings need fields with one row a sample, but have these numbers of rows: {rows}')
    metadata = {} if prompts is None else dict(prompts=json.dumps(list(prompts), ensure_ascii=False))
    tensors = _unshared(fields)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f'{target.name}.part')
    try:
        save_file(tensors, part, metadata=metadata)
    except BaseException:  # a full disk should not keep what nobody can read
        part.unlink(missing_ok=True)
        raise
    os.replace(part, target)


def _unshared(fields: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """The fields on the CPU, each with memory of its own: save_file refuses slices of one batch. A shard may fill a
    good part of the memory, so only those that need it are copied."""
    tensors, seen = {}, set()
    for name, field in fields.items():
        field = field.detach().cpu()
        storage = field.untyped_storage()
        if not field.is_contiguous() or storage.nbytes() != field.nbytes or storage.data_ptr() in seen:
            field = field.clone(memory_format=torch.contiguous_format)
        seen.add(storage.data_ptr())
        tensors[name] = field
    return tensors


def read_header(path: str) -> ShardHeader:
    """Reads what a shard holds, but no tensor.

    Args:
        path (str): The shard.

    Returns:
        ShardHeader: Its fields, number of samples and prompts.

    Raises:
        ValueError: If the file is damaged, has no field, or its fields and prompts differ in number.
    """
    try:
        with safe_open(path, 'pt') as shard:
            slices = {name: shard.get_slice(name) for name in sorted(shard.keys())}
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            dtypes = {name: str(part.get_dtype()) for name, part in slices.items()}
            prompts = _parse_prompts(path, (shard.metadata() or {}).get('prompts'))
    except (SafetensorError, OSError) as error:
        raise ValueError(f'shard {path} is truncated or not a safetensors file ({error}): write it again') from error
    if not all(shapes.values()):
        raise ValueError(f'shard {path}: each field needs a first dimension, one row a sample, but shapes are {shapes}')
    rows = {name: shape[0] for name, shape in shapes.items()}
    if prompts is not None:
        rows['prompts'] = len(prompts)
    if not shapes or len(set(rows.values())) != 1:
        raise ValueError(f'shard {path} needs fields with one row a sample, but has these numbers of rows: {rows}')
    fields = {name: (shape[1:], dtypes[name]) for name, shape in shapes.items()}
    return ShardHeader(fields, next(iter(rows.values())), prompts)


def _parse_prompts(path: str, text: Optional[str]) -> Optional[List[str]]:
    if text is None:
        return None
    try:
        prompts = json.loads(text)
    except json.JSONDecodeError:
        prompts = None
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"shard {path}: 'prompts' in its metadata is not a JSON list of texts")
    return prompts


def hash_prompts(prompts: Sequence[str]) -> str:
    """SHA-256 of a list of prompts, in its order, as hexadecimal digits."""
    return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()


def read_index(folder: Union[str, Path]) -> Optional[Dict[str, Any]]:
    """The index of a folder, or None if it has none.

    Args:
        folder (str): The folder of the shards.

    Returns:
        dict: As `write_index` wrote it, with `INDEX_KEYS` in it.

    Raises:
        ValueError: If the index is damaged, or written by a newer version of this package.
    """
    path = Path(folder, INDEX)
    if not path.is_file():
        return None
    try:
        index = json.loads(path.read_text(encoding='utf-8'))
    except ValueError:
        index = None
    if isinstance(index, dict) and index.get('version', 0) != INDEX_VERSION:
        raise ValueError(f'{path} has version {index.get("version")!r}, but this cdm_plugin reads version '
                         f'{INDEX_VERSION}: update cdm_plugin, or make the folder again with `cdm cache`')
    absent = [key for key in INDEX_KEYS if not isinstance(index, dict) or key not in index]
    if absent:
        raise ValueError(f'{path} is damaged (it has no {absent[0]}): delete the folder and run `cdm cache` again')
    return index


def write_index(folder: Union[str, Path], index: Mapping[str, Any]) -> None:
    """Writes the index of a folder, whole or not at all."""
    path = Path(folder, INDEX)
    part = path.with_name(f'{INDEX}.part')
    part.write_text(json.dumps(index, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')
    os.replace(part, path)


def describe_shard(path: Union[str, Path], prompts: Sequence[str]) -> Dict[str, Any]:
    """What the index says of a finished shard: `name`, `rows`, `bytes` and, of its prompts, `sha256`."""
    path = Path(path)
    return dict(name=path.name, rows=len(prompts), bytes=path.stat().st_size, sha256=hash_prompts(prompts))


def read_indexed_header(folder: Union[str, Path], entry: Mapping[str, Any]) -> ShardHeader:
    """Reads what a shard holds, but no tensor, and compares it with the index.

    Args:
        folder (str): The folder of the shards.
        entry (dict): What the index says of the shard, as `describe_shard` made it.

    Returns:
        ShardHeader: Its fields, number of samples and prompts.

    Raises:
        ValueError: If the shard is missing, damaged, or has another size, number of rows or other prompts.
    """
    path = Path(folder, entry['name'])
    if not path.is_file():
        raise ValueError(f'shard {path} is missing')
    if path.stat().st_size != entry['bytes']:
        raise ValueError(f'shard {path} has {path.stat().st_size} bytes instead of {entry["bytes"]}')
    header = read_header(str(path))
    if header.rows != entry['rows']:
        raise ValueError(f'shard {path} has {header.rows} rows instead of {entry["rows"]}')
    if hash_prompts(header.prompts or []) != entry['sha256']:
        raise ValueError(f'shard {path} holds other prompts than the index says')
    return header


class EmbeddingReader:
    """Reads single rows of shards, and keeps each shard that it has read from open (mapped, not loaded).

    Open shards belong to the process that opened them: a copy by pickle, fork or deepcopy opens its own.
    """

    def __init__(self) -> None:
        self._slices: Dict[str, Dict[str, Any]] = {}
        self._process = os.getpid()

    def read(self, path: str, row: int) -> Dict[str, Tensor]:
        """One sample.

        Args:
            path (str): The shard.
            row (int): Row of the sample in it.

        Returns:
            dict: Tensors by field, each without the first dimension, in memory of its own.
        """
        # The clone matters: a row is a view of the whole field, which a data-loader worker would send with it.
        return {name: part[row].clone() for name, part in self._open(path).items()}

    def _open(self, path: str) -> Dict[str, Any]:
        if self._process != os.getpid():
            self._slices, self._process = {}, os.getpid()
        if path not in self._slices:
            shard = safe_open(path, 'pt')
            self._slices[path] = {name: shard.get_slice(name) for name in sorted(shard.keys())}
        return self._slices[path]

    def __getstate__(self) -> Dict[str, Any]:
        return dict(_slices={}, _process=None)
