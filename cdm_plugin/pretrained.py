"""What `from_pretrained` may be told, and checks of it: folders, hub ids, dtypes."""
import contextlib
import inspect
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants

from cdm_plugin.errors import did_you_mean
from cdm_plugin.files import inside
from cdm_plugin.secrets import unmasked

# What `from_pretrained` may be told.
LOAD_KEYS = ('revision', 'variant', 'cache_dir', 'local_files_only', 'token', 'force_download', 'use_safetensors')
# What the loaders of config files take of that.
HUB_KEYS = ('revision', 'cache_dir', 'local_files_only', 'token', 'force_download')


def absolute_folder(pretrained: str) -> str:
    """A hub id as it is, a folder by its absolute path, so that a config is valid from anywhere on this machine."""
    return str(Path(pretrained).resolve()) if Path(pretrained).is_dir() else pretrained


def check_folder(path: str, given: str, key: str, what: str) -> str:
    """The path, if it is a folder or may be a hub id: a name, or an owner and a name. An owner whose name a folder here
    has is taken for that folder, unless the id is in the local cache.

    Raises:
        FileNotFoundError: If `given` looks like a path and is no folder; names the config's key and what belongs there.
    """
    if not Path(path).is_dir():
        cached = Path(constants.HF_HUB_CACHE, f'models--{given.replace("/", "--")}').is_dir()
        owner, slash, _ = given.partition('/')
        beside = bool(slash) and Path(owner).is_dir() and not cached
        if (given.startswith(('/', './', '../', '~', 'asset:')) or given.endswith('/') or given.count('/') > 1
                or Path(path).exists() or beside):
            where = '' if Path(given).is_absolute() or given.startswith('asset:') else f' in {os.getcwd()}'
            hub = 'a hub id' + beside * f' (with the folder {owner!r} here, one that `hf download` has fetched)'
            raise FileNotFoundError(f'{key}={given!r} is no folder{where}: give {what}, or {hub}')
    check_weight_indexes(path)
    return path


@contextlib.contextmanager
def naming_absent(pretrained: str, key: str) -> Iterator[None]:
    """Context of reading what `pretrained` names.

    Raises:
        FileNotFoundError: If it is no folder and cannot be fetched; diffusers speaks of a missing config.json then.
    """
    try:
        yield
    except OSError as error:
        if Path(pretrained).is_dir():
            raise
        cause = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f'{key}={pretrained!r} is no folder here, and as a hub id it is not in the local cache '
                                'and cannot be fetched (no connection, no access, or no such repository): '
                                f'{cause}') from error


def check_weight_indexes(pretrained: str) -> None:
    """Checks that the weights' indexes in a folder name files of that folder; a hub id has none here yet.

    Raises:
        ValueError: If one names anything else. Diffusers and transformers read whatever is named.
    """
    root = Path(pretrained)
    for index in [*root.glob('*.index.json'), *root.glob('*/*.index.json')] if root.is_dir() else ():
        try:
            names = set(json.loads(index.read_text(encoding='utf-8'))['weight_map'].values())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ValueError(f'{index} is damaged: copy it again') from None
        for name in names:
            inside(index.parent, name, index)


def origin(load_kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those of from_pretrained's arguments that say which weights are meant (and are no secret)."""
    return {k: v for k, v in load_kwargs.items() if k in ('revision', 'variant')}


def check_load_keys(load_kwargs: dict[str, Any], key: str, cls: type) -> None:
    """Takes out masked arguments, a token in a config that a run has written down: the hub's own counts then.

    Raises:
        ValueError: For arguments that `from_pretrained` does not have: misspelt ones of the class itself.
    """
    given = unmasked(load_kwargs)
    for name in [name for name in load_kwargs if name not in given]:
        del load_kwargs[name]
    for name in load_kwargs:
        if name not in LOAD_KEYS:
            known = [n for base in cls.__mro__ if '__init__' in vars(base) and base.__module__.startswith('cdm_plugin')
                     for n, p in inspect.signature(vars(base)['__init__']).parameters.items()
                     if n != 'self' and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
            known = list(dict.fromkeys([*known, *LOAD_KEYS]))
            raise ValueError(f'{key}.{name} is unknown: {cls.__name__} takes {", ".join(known)}'
                             f'{did_you_mean(name, known)}')


def check_dtype(dtype: str, key: str, *others: str) -> torch.dtype:
    """A dtype by its name. float16 is refused: its range is too small for T5 and for large transformers.

    `others` are names that the caller takes too.

    Raises:
        ValueError: If it is none of float32, bfloat16 and float64; names the config's key.
    """
    value = getattr(torch, str(dtype), None)
    if value not in (torch.float32, torch.float64, torch.bfloat16):
        why = ' (float16 overflows in these models: take bfloat16)' if value is torch.float16 else ''
        known = ', '.join((*others, 'float32', 'bfloat16'))
        raise ValueError(f'{key} must be {known} or float64, but is {dtype!r}{why}')
    return value
