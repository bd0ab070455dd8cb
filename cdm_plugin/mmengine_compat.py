"""Makes stock MMEngine 0.10.7 work with today's torch, setuptools and numpy, without a fork.

`apply` repairs six things in place, and leaves alone what is not MMEngine's own:

- checkpoints are read without unpickling objects (torch >= 2.6 refuses them anyway),
- a checkpoint is written whole or not at all,
- a copied or moved work_dir resumes from its own files,
- packages are found without `pkg_resources`, which setuptools 82 removed,
- FlexibleRunner takes a config without `env_cfg` and `launcher`, as Runner does,
- recipes of this package resolve: `cdm_plugin::sd3/x.py`, and `from cdm_plugin.configs.sd3.x import *` in `read_base`.

`pack_message_hub`, `unpack_message_hub` and `plain` keep what a run saves loadable in this way.
"""
import importlib.metadata
import importlib.util
import logging
import os
import pickle
import re
import sys
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any, Callable, Optional

import mmengine.config.config as config_module
import mmengine.config.utils as config_utils
import mmengine.runner.checkpoint as checkpoint_module
import mmengine.utils.package_utils as package_utils
import numpy as np
import torch
from mmengine.config import Config
from mmengine.fileio import LocalBackend
from mmengine.logging import HistoryBuffer, print_log
from mmengine.runner import CheckpointLoader, FlexibleRunner

PACKAGE = 'cdm_plugin'
MIM = Path(__file__).parent / '.mim'
TRUST = 'CDM_TRUST_CHECKPOINTS'
NUMBERED = re.compile(r'(iter|epoch)_(\d+)\.pth')

_stock_cfg_path = Config._get_cfg_path
_stock_flexible_from_cfg = FlexibleRunner.from_cfg.__func__


class CheckpointError(RuntimeError, ValueError):
    """A checkpoint that cannot be read: RuntimeError as torch raises, and a mistake of the user like other values."""


def apply() -> None:
    """Applies every repair to the MMEngine of this process. Calling it again changes nothing."""
    _register_local_loader()
    _replace(checkpoint_module, 'find_latest_checkpoint', find_latest_checkpoint)
    if LocalBackend.put.__module__.startswith('mmengine.'):
        LocalBackend.put = put_whole
    for ours in (is_installed, get_installed_path, package2module):
        _replace(package_utils, ours.__name__, ours)
    if FlexibleRunner.from_cfg.__func__ is _stock_flexible_from_cfg:
        FlexibleRunner.from_cfg = classmethod(flexible_runner_from_cfg)
    _add_recipes()


def load_from_local(filename: str, map_location: Any = None) -> Any:
    """Loads a checkpoint file without unpickling objects, because an object can run code when it is unpickled.

    Args:
        filename (str): Path of the file, or of a folder of shards, whose weights are put together; `~` is expanded.
        map_location: As in :func:`torch.load`. Defaults to None.

    Returns:
        Any: What the file holds, usually a dict.

    Raises:
        FileNotFoundError: If there is no such file.
        RuntimeError: If the file is damaged, or holds objects and CDM_TRUST_CHECKPOINTS=1 is not set.
    """
    path = os.path.expanduser(filename)
    if os.path.isdir(path):
        from cdm_plugin.engine.shards import is_sharded, read_whole  # which needs MMEngine repaired
        if is_sharded(path):
            return read_whole(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f'There is no checkpoint {path}: check the path given on the command line, or '
                                'load_from of the config')
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:
        if _is_damaged(path, error):
            raise CheckpointError(f'Checkpoint {path} is damaged or was cut short: copy it again, or delete it and '
                                  'resume from an earlier one') from None
        if not isinstance(error, pickle.UnpicklingError):
            raise
        if os.environ.get(TRUST) != '1':
            raise CheckpointError(
                f'Checkpoint {path} holds pickled objects ({_unsafe_global(error)}), which can run code when loaded: '
                f'if you trust where it comes from, set the environment variable {TRUST}=1 and start again (a run with '
                'CDMHook writes none)') from None
    print_log(f'Unpickling the objects of {path}, as {TRUST}=1 says to', logger='current', level=logging.WARNING)
    return torch.load(path, map_location=map_location, weights_only=False)


def put_whole(self: LocalBackend, obj: bytes, filepath: Any) -> None:
    """Writes a file whole or not at all: a run killed while it saves leaves no checkpoint cut short.

    Args:
        obj (bytes): Data to be written.
        filepath (str or Path): Where to; its folder is made if need be.
    """
    os.makedirs(os.path.dirname(filepath) or '.', exist_ok=True)
    part = f'{filepath}.{os.getpid()}.part'
    with open(part, 'wb') as file:
        file.write(obj)
    os.replace(part, filepath)


def flexible_runner_from_cfg(cls: type, cfg: Config) -> FlexibleRunner:
    """Builds a FlexibleRunner from a config; what it leaves out has the defaults of Runner."""
    return _stock_flexible_from_cfg(cls, Config({**dict(env_cfg=dict(dist_cfg=dict(backend='nccl')), launcher='none'),
                                                 **cfg}))


def find_latest_checkpoint(path: str) -> Optional[str]:
    """Finds the checkpoint from which a work_dir resumes: one of its own, wherever the directory was copied to.

    Args:
        path (str): The work_dir.

    Returns:
        str or None: The file that `last_checkpoint` names, inside `path`; the newest iter_N.pth or epoch_N.pth there
        if that one is missing; None if there is neither.
    """
    save_file = Path(path, 'last_checkpoint')
    named = save_file.read_text().strip() if save_file.is_file() else ''
    found = _relocate(named, path) if named else None
    if found is not None:
        return found
    found = _newest_numbered(path, os.path.basename(named))
    if found is not None:
        reason = f'{os.path.basename(named)}, named by last_checkpoint, is missing' if named else 'no last_checkpoint'
        print_log(f'{path}: {reason}; the newest checkpoint there is {found}', logger='current', level=logging.WARNING)
    elif not named:
        print_log('Did not find last_checkpoint to be resumed.')
    return found


def pack_message_hub(state: dict) -> dict:
    """Turns the state of MMEngine's MessageHub into tensors and plain data, for a checkpoint.

    Args:
        state (dict): What `MessageHub.state_dict()` returns.

    Returns:
        dict: The same keys. Histories are stored as bytes, which survive a map_location to devices without float64;
        entries of `runtime_info` that are not plain data are left out.
    """
    return _hub_state(state, plain(state['runtime_info']), _pack_buffer)


def unpack_message_hub(state: dict, work_dir: Optional[str] = None) -> dict:
    """Undoes `pack_message_hub`. A state that was never packed comes back as it is.

    Args:
        state (dict): The entry `message_hub` of a checkpoint.
        work_dir (str, optional): Where the run lives now. If given, the checkpoints that the state remembers
            (`last_ckpt`, `best_ckpt`) are looked for there: otherwise CheckpointHook, on finding a better one in a
            copied run, would delete the best checkpoint of the original. Defaults to None.

    Returns:
        dict: For `MessageHub.load_state_dict`, with HistoryBuffers equal to the saved ones to the bit.
    """
    # Old versions of MMEngine saved the MessageHub itself.
    if not isinstance(state, dict):
        return state
    info = state['runtime_info'] if work_dir is None else _relocate_info(state['runtime_info'], work_dir)
    return _hub_state(state, info, _unpack_buffer)


def plain(obj: Any) -> Any:
    """Copies nested data as what `torch.load(weights_only=True)` accepts: tensors, numbers, text and containers.

    Numpy scalars become Python numbers, arrays nested lists, and subclasses of dict, list and tuple the plain kind.
    An entry of a dict that cannot be expressed in this way is left out with a warning (OneCycleLR, for example, keeps
    a function in its state, which its constructor sets again).

    Args:
        obj: The data.

    Returns:
        Any: The copy; tensors are shared, not copied.

    Raises:
        TypeError: If `obj` itself, or an element of a list, is neither.
    """
    if isinstance(obj, dict):
        return _plain_dict(obj)
    if isinstance(obj, (list, tuple)):
        return (list if isinstance(obj, list) else tuple)(plain(value) for value in obj)
    if isinstance(obj, (np.generic, np.ndarray)):
        return plain(obj.tolist())
    if obj is None or type(obj) in (bool, int, float, str, bytes) or isinstance(
            obj, (torch.Tensor, torch.dtype, torch.device)):
        return obj
    raise TypeError(f'{type(obj).__name__} is not plain data')


def is_installed(package: str) -> bool:
    """Tells whether a distribution or an importable module (not a namespace package) has this name.

    Args:
        package (str): Name of the distribution or module.
    """
    try:
        importlib.metadata.distribution(package)
        return True
    except importlib.metadata.PackageNotFoundError:
        spec = importlib.util.find_spec(package)
        return spec is not None and spec.origin is not None


def get_installed_path(package: str) -> str:
    """Finds the directory of a package, editable installs and PYTHONPATH included.

    Args:
        package (str): Name of the distribution (mmcv-full) or of the module (mmcv).

    Returns:
        str: The directory.

    Raises:
        PackageNotFoundError: If nothing of this name is installed or importable.
        RuntimeError: If it is a namespace package, which has no directory of its own.
    """
    spec = importlib.util.find_spec(package)
    if spec is None:
        spec = importlib.util.find_spec(package2module(package))
    if spec is None or spec.origin is None:
        raise RuntimeError(f'{package} is a namespace package, which is invalid for `get_installed_path`')
    return os.path.dirname(spec.origin)


def package2module(package: str) -> str:
    """Infers the name of the module that a distribution installs.

    Args:
        package (str): Name of the distribution.

    Raises:
        PackageNotFoundError: If it is not installed.
        ValueError: If it does not say which module it installs.
    """
    distribution = importlib.metadata.distribution(package)
    names = (distribution.read_text('top_level.txt') or '').split()
    # Only setuptools writes top_level.txt; other builders leave the list of files.
    names = names or [file.parts[0] for file in distribution.files or [] if file.name == '__init__.py']
    if not names:
        raise ValueError(f'can not infer the module name of {package}')
    return names[0]


def _replace(module: Any, name: str, ours: Callable) -> None:
    """Puts `ours` in place of `module.name`, in every module of MMEngine that has imported the name."""
    stock = getattr(module, name, None)
    if stock is None:
        return
    for key, other in list(sys.modules.items()):
        if key.split('.')[0] == 'mmengine' and vars(other).get(name) is stock:
            setattr(other, name, ours)


def _register_local_loader() -> None:
    registered = CheckpointLoader._schemes.get('')
    # A loader that the host registered itself was meant to be used.
    if registered is None or registered.__module__.startswith('mmengine.'):
        CheckpointLoader.register_scheme(prefixes='', loader=load_from_local, force=True)


def _add_recipes() -> None:
    config_utils.MODULE2PACKAGE.setdefault(PACKAGE, PACKAGE)
    config_module.get_installed_path = _lazy_base_path
    Config._get_cfg_path = staticmethod(_get_cfg_path)


def _lazy_base_path(package: str) -> str:
    """Where `read_base` looks: cdm_plugin.configs is no module, its recipes are installed below .mim."""
    return str(MIM) if package == PACKAGE else get_installed_path(package)


def _get_cfg_path(cfg_path: str, filename: str) -> tuple:
    """Resolves one `_base_`. Ours has no scope: its parts are in the root registries, so `_scope_` would only warn."""
    if not cfg_path.startswith(f'{PACKAGE}::'):
        return _stock_cfg_path(cfg_path, filename)
    return config_utils._get_external_cfg_base_path(str(MIM.parent), cfg_path.partition('::')[2]), None


def _is_damaged(path: str, error: Exception) -> bool:
    with open(path, 'rb') as file:
        head = file.read(2)
    if head == b'PK':
        return 'PytorchStreamReader' in str(error)
    # The format before torch 1.6 is a row of pickles, and every pickle begins with 0x80.
    return head[:1] != b'\x80' or isinstance(error, (EOFError, IndexError)) or 'unexpected EOF' in str(error)


def _unsafe_global(error: Exception) -> str:
    match = re.search(r'GLOBAL (\S+)', str(error))
    return match.group(1) if match else 'of a kind that torch does not name'


def _relocate(named: str, work_dir: str) -> Optional[str]:
    """The checkpoint `named` as seen from `work_dir`; None if it is gone, or belongs to another work_dir."""
    here = os.path.join(work_dir, os.path.basename(named))
    if os.path.exists(here):
        return here
    # With CheckpointHook.out_dir the files lie elsewhere on purpose; a work_dir is known by its last_checkpoint.
    apart = os.path.exists(named) and not os.path.exists(os.path.join(os.path.dirname(named), 'last_checkpoint'))
    return named if apart or '://' in named else None


def _newest_numbered(path: str, named: str) -> Optional[str]:
    """The checkpoint of the highest number in `path`, of the kind of `named` (iter or epoch) if there is one."""
    matches = [match for match in map(NUMBERED.fullmatch, os.listdir(path)) if match] if os.path.isdir(path) else []
    kind = named.partition('_')[0]
    newest = max(matches, key=lambda match: (match.group(1) == kind, int(match.group(2))), default=None)
    return None if newest is None else os.path.join(path, newest.group())


def _relocate_info(info: dict, work_dir: str) -> dict:
    """Points the checkpoints that `info` remembers at `work_dir`, and forgets those which are not there."""
    moved = OrderedDict(info)
    for key, value in info.items():
        if isinstance(value, str) and (key == 'last_ckpt' or key.startswith('best_ckpt')):
            moved[key] = _relocate(value, work_dir)
            if moved[key] is None:
                del moved[key]
    return moved


def _hub_state(state: dict, info: dict, convert: Callable) -> dict:
    # MessageHub warns about keys which it is to resume and cannot find.
    dropped = state['runtime_info'].keys() - info.keys()
    return dict(
        log_scalars=OrderedDict((key, convert(value)) for key, value in state['log_scalars'].items()),
        runtime_info=info,
        resumed_keys=OrderedDict((key, value) for key, value in state['resumed_keys'].items() if key not in dropped))


def _pack_buffer(buffer: HistoryBuffer) -> dict:
    log, count = buffer.data
    return dict(log=_to_bytes(log), count=_to_bytes(count), max_length=buffer.max_length)


def _unpack_buffer(packed: Any) -> Any:
    if not isinstance(packed, dict):
        return packed
    return HistoryBuffer(_from_bytes(packed['log']), _from_bytes(packed['count']), packed['max_length'])


def _to_bytes(array: np.ndarray) -> dict:
    return dict(dtype=array.dtype.str, data=torch.from_numpy(np.ascontiguousarray(array).view(np.uint8).copy()))


def _from_bytes(packed: dict) -> np.ndarray:
    return packed['data'].cpu().numpy().view(packed['dtype'])


def _plain_dict(obj: dict) -> dict:
    kept = OrderedDict() if isinstance(obj, OrderedDict) else {}
    for key, value in obj.items():
        try:
            kept[plain(key)] = plain(value)
        except TypeError as error:
            warnings.warn(f'{key!r} is left out of the checkpoint: {error}')
    return kept
