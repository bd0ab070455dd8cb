"""Files of cached text embeddings.

A shard is a safetensors file whose tensors are the fields of the condition (`encoder_hidden_states` (N, L, D),
`pooled_projections` (N, P), ...), one row a sample; its metadata may hold the prompts, under `prompts`, as a JSON list.
Texts of different lengths lie end to end, (L_1 + ... + L_N, D); `encoder_hidden_states.starts`, int64, (N + 1,), says
where each of them begins and the last one ends. `encoder_hidden_states.crc32`, int64, (N,), are the rows' checksums.

A folder that `cdm cache` made has an index beside its shards, which says what they hold and who encoded it.
"""
import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cdm_plugin.arguments import check_value
from cdm_plugin.condition import check_embeddings
from cdm_plugin.data.sample import SampleError
from cdm_plugin.files import inside, whole_file

NULL = 'null.safetensors'
STARTS, CHECKSUMS = '.starts', '.crc32'
Fields = Mapping[str, Tensor | Sequence[Tensor]]
Field = tuple[tuple[int | None, ...], str]
INDEX = 'index.json'
INDEX_VERSION = 1
INDEX_KEYS = ('prompts', 'shard_size', 'dtype', 'encoder', 'source', 'fields', 'shards')
# What must be in it of the prompts and of each shard; there may be more.
OF_PROMPTS = dict(count=int, sha256=str)
OF_SHARD = dict(name=str, rows=int, bytes=int, sha256=str)


class ShardHeader(NamedTuple):
    """What a shard holds.

    Attributes:
        fields (dict): Shape of one sample, and dtype, by field; its first number is None where samples differ in it.
        rows (int): Number of samples N.
        prompts (list[str], optional): The prompts, or None if the shard does not say.
        content (str, optional): SHA-256 of the rows' checksums, or None if it has none.
    """
    fields: dict[str, Field]
    rows: int
    prompts: list[str] | None
    content: str | None = None


def write_embeddings(path: str, fields: Fields, prompts: list[str] | None = None) -> None:
    """Writes one shard. A run that is killed meanwhile leaves no half of it under this name.

    Args:
        path (str): File to write, `*.safetensors`; its folder is made.
        fields (dict): Tensors by field, each (N, ...), or a list of N tensors (L_i, ...), without padding.
        prompts (list[str], optional): The N prompts. Default None.

    Raises:
        ValueError: If the suffix is another one, there is no field, the numbers of rows differ, or an embedding is not
            floating or not finite.
    """
    target = Path(path)
    if target.suffix != '.safetensors':
        raise ValueError(f'path {path} must end in .safetensors')
    rows = {name: 0 if isinstance(field, Tensor) and not field.ndim else len(field) for name, field in fields.items()}
    if prompts is not None:
        rows['prompts'] = len(prompts)
    if not fields or len(set(rows.values())) != 1:
        raise ValueError(f'embeddings need fields with one row a sample, but have these numbers of rows: {rows}')
    for row in range(next(iter(rows.values()))):
        check_embeddings({name: field[row] for name, field in fields.items()},
                         f'row {row}{"" if prompts is None else f" ({prompts[row][:40]!r})"} of {path}')
    metadata = {} if prompts is None else dict(prompts=json.dumps(list(prompts), ensure_ascii=False))
    tensors = _unshared(_end_to_end(fields))
    tensors.update({name + CHECKSUMS: torch.tensor([_checksum(row) for row in rows]) for name, rows in fields.items()})
    with whole_file(target) as part:
        save_file(tensors, part, metadata=metadata)


def _checksum(row: Tensor) -> int:
    """CRC-32 of a row's bytes."""
    return zlib.crc32(row.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _end_to_end(fields: Fields) -> dict[str, Tensor]:
    tensors = {}
    for name, rows in fields.items():
        if not isinstance(rows, Tensor):
            lengths = torch.tensor([0, *map(len, rows)])
            tensors[name + STARTS], rows = lengths.cumsum(0), torch.cat(list(rows))
        tensors[name] = rows
    return tensors


def _unshared(fields: dict[str, Tensor]) -> dict[str, Tensor]:
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
    """Reads what a shard holds, but no embedding.

    Args:
        path (str): The shard.

    Returns:
        ShardHeader: Its fields, number of samples and prompts.

    Raises:
        ValueError: If the file is damaged, has no field, or its fields and prompts differ in number.
    """
    try:
        slices, starts, checksums, metadata = _open_shard(path)
        shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
        dtypes = {name: str(part.get_dtype()) for name, part in slices.items()}
        prompts = _parse_prompts(path, metadata.get('prompts'))
    except (SafetensorError, OSError) as error:
        raise ValueError(f'shard {path} is truncated or not a safetensors file ({error}): write it again') from error
    if not all(shapes.values()):
        raise ValueError(f'shard {path}: each field needs a first dimension, one row a sample, but shapes are {shapes}')
    rows = {name: shape[0] for name, shape in shapes.items()}
    for name, ends in starts.items():
        if (ends[:1], ends[-1:]) != ([0], [rows.get(name)]) or ends != sorted(ends):
            raise ValueError(f'shard {path}: {name + STARTS} does not cut {name} into rows: write it again')
        rows[name], shapes[name] = len(ends) - 1, (0, None, *shapes[name][1:])
    if prompts is not None:
        rows['prompts'] = len(prompts)
    if not shapes or len(set(rows.values())) != 1:
        raise ValueError(f'shard {path} needs fields with one row a sample, but has these numbers of rows: {rows}')
    for name, sums in checksums.items():
        if not isinstance(sums, list) or name not in rows or len(sums) != rows[name]:
            raise ValueError(f'shard {path}: {name + CHECKSUMS} does not fit {name}: write it again')
    fields = {name: (shape[1:], dtypes[name]) for name, shape in shapes.items()}
    content = hashlib.sha256(json.dumps(checksums).encode()).hexdigest() if checksums else None
    return ShardHeader(fields, next(iter(rows.values())), prompts, content)


def _open_shard(path: str) -> tuple[dict[str, Any], dict[str, list[int]], dict[str, list[int]], dict[str, str]]:
    """The fields of a shard, mapped; where the rows of those of different lengths start; the rows' checksums; the
    metadata."""
    shard = safe_open(path, 'pt')
    names = sorted(shard.keys())
    starts, checksums = ({name.removesuffix(end): shard.get_tensor(name).tolist() for name in names
                          if name.endswith(end)} for end in (STARTS, CHECKSUMS))
    slices = {name: shard.get_slice(name) for name in names if not name.endswith((STARTS, CHECKSUMS))}
    return slices, starts, checksums, shard.metadata() or {}


def _parse_prompts(path: str, text: str | None) -> list[str] | None:
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


def read_index(folder: str | Path) -> dict[str, Any] | None:
    """The index of a folder, or None if it has none.

    Args:
        folder (str): The folder of the shards.

    Returns:
        dict: As `write_index` wrote it, with `INDEX_KEYS` in it.

    Raises:
        ValueError: If the index is damaged, written by a newer version of this package, or names a shard outside of
            the folder.
    """
    path = Path(folder, INDEX)
    index = load_index(path, INDEX_VERSION, INDEX_KEYS, 'cdm cache')
    if index is None:
        return None
    for key, of_key in dict(prompts=dict, shards=list[dict], fields=dict, dtype=str).items():
        check_value(index[key], of_key, f'{path}: {key}')
    parts = [('prompts', index['prompts'], OF_PROMPTS)]
    parts += [(f'shards[{i}]', shard, OF_SHARD) for i, shard in enumerate(index['shards'])]
    for place, part, of_part in parts:
        for key, kind in of_part.items():
            check_value(part.get(key), kind, f'{path}: {place}.{key}')
    return index


def load_index(path: Path, version: int, keys: Iterable[str], command: str) -> dict[str, Any] | None:
    """The index of any folder of shards, or None if it has none.

    Args:
        path (Path): The file.
        version (int): The one that this package reads.
        keys (Iterable[str]): What the index must have; `shards` is among them.
        command (str): What makes the folder.

    Raises:
        ValueError: If the index is damaged, of another version, or names a shard outside of the folder.
    """
    if not path.is_file():
        return None
    try:
        index = json.loads(path.read_text(encoding='utf-8'))
    except ValueError:
        index = None
    if isinstance(index, dict) and index.get('version', version) != version:
        raise ValueError(f'{path} has version {index["version"]!r}, but this cdm_plugin reads version {version}: '
                         f'update cdm_plugin, or make the folder again with `{command}`')
    absent = [key for key in ('version', *keys) if not isinstance(index, dict) or key not in index]
    if absent:
        raise ValueError(f'{path} is damaged (it has no {absent[0]}): delete the folder and run `{command}` again')
    check_value(index['shards'], list, f'{path}: shards')
    for entry in index['shards']:
        inside(path.parent, entry.get('name') if isinstance(entry, dict) else entry, path)
    return index


def write_index(folder: str | Path, index: Mapping[str, Any], name: str = INDEX) -> None:
    """Writes the index of a folder, whole or not at all."""
    with whole_file(Path(folder, name)) as part:
        part.write_text(json.dumps(index, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')


def describe_shard(path: str | Path, prompts: Sequence[str]) -> dict[str, Any]:
    """What the index says of a finished shard: `name`, `rows`, `bytes`, of its prompts `sha256` and of its embeddings
    `content`, see `ShardHeader`."""
    path = Path(path)
    return dict(name=path.name, rows=len(prompts), bytes=path.stat().st_size, sha256=hash_prompts(prompts),
                content=read_header(str(path)).content)


def read_indexed_header(folder: str | Path, entry: Mapping[str, Any]) -> ShardHeader:
    """Reads what a shard holds, but no embedding, and compares it with the index.

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
    if header.content != entry.get('content', header.content):  # there is none in an index of earlier versions
        raise ValueError(f'shard {path} holds other embeddings than the index says')
    return header


class EmbeddingReader:
    """Reads single rows of shards, and keeps each shard that it has read from open (mapped, not loaded).

    Open shards belong to the process that opened them: a copy by pickle, fork or deepcopy opens its own.
    """

    def __init__(self) -> None:
        self._shards: dict[str, tuple] = {}
        self._process = os.getpid()

    def read(self, path: str, row: int) -> dict[str, Tensor]:
        """One sample.

        Args:
            path (str): The shard.
            row (int): Row of the sample in it.

        Returns:
            dict: Tensors by field, each without the first dimension, in memory of its own.

        Raises:
            ValueError: If they are not what was written, as their checksums say, or not floating or not finite.
        """
        if self._process != os.getpid():
            self._shards, self._process = {}, os.getpid()
        if path not in self._shards:
            self._shards[path] = _open_shard(path)[:3]
        slices, starts, checksums = self._shards[path]
        # The clone matters: a row is a view of the whole field, which a data-loader worker would send with it.
        fields = {name: (part[slice(*starts[name][row:row + 2])] if name in starts else part[row]).clone()
                  for name, part in slices.items()}
        for name in checksums:
            if _checksum(fields[name]) != checksums[name][row]:
                raise SampleError(f'row {row} of shard {path} is damaged: {name} differs from its checksum; copy the '
                                  'file again, or delete it and run `cdm cache` again')
        try:
            check_embeddings(fields, f'row {row} of shard {path}')
        except ValueError as error:  # in a worker too it is one line
            raise SampleError(str(error)) from None
        return fields

    def __getstate__(self) -> dict[str, Any]:
        return dict(_shards={}, _process=None)
