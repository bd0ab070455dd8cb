"""Files of cached text embeddings.

A shard is a safetensors file whose tensors are the fields of the condition (`encoder_hidden_states` (N, L, D),
`pooled_projections` (N, P), ...), one row a sample; its metadata may hold the prompts, under `prompts`, as a JSON list.
"""
import json
import os
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


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
    # save_file refuses tensors that share memory, as slices of one batch do.
    tensors = {name: field.detach().cpu().clone(memory_format=torch.contiguous_format)
               for name, field in fields.items()}
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f'{target.name}.part')
    save_file(tensors, part, metadata=metadata)
    os.replace(part, target)


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
