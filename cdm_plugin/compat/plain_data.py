"""What a run saves as tensors and plain data, which load without unpickling an object."""
import os
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

from cdm_plugin.files import relocate


def pack_message_hub(state: dict) -> dict:
    """Turns the state of MMEngine's MessageHub into tensors and plain data, for a checkpoint.

    Args:
        state (dict): What `MessageHub.state_dict()` returns.

    Returns:
        dict: The same keys. Histories are stored as bytes, which survive a map_location to devices without float64;
        entries of `runtime_info` that are not plain data are left out.
    """
    return _hub_state(state, plain(state['runtime_info']), _pack_buffer)


def unpack_message_hub(state: dict, work_dir: str | None = None) -> dict:
    """Undoes `pack_message_hub`. A state that was never packed comes back as it is.

    Args:
        state (dict): The entry `message_hub` of a checkpoint.
        work_dir (str, optional): Where the run lives now. If given, the checkpoints that the state remembers
            (`last_ckpt`, `best_ckpt`) are looked for there: otherwise CheckpointHook, on finding a better one in a
            copied run, would delete the best checkpoint of the original. Default None.

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


def _relocate_info(info: dict, work_dir: str) -> dict:
    """Points the checkpoints that `info` remembers at `work_dir`, and forgets those which are not there."""
    moved = OrderedDict(info)
    for key, value in info.items():
        # CheckpointHook removes what these name, and the checkpoint may be a stranger's.
        if key == 'last_ckpt' or key.startswith('best_ckpt'):
            named = isinstance(value, str) and (key == 'last_ckpt' or os.path.basename(value).startswith('best_'))
            moved[key] = relocate(value, work_dir) if named else None
            if moved[key] is None:
                del moved[key]
        elif key == 'keep_ckpt_ids' and not (isinstance(value, list) and all(isinstance(n, int) for n in value)):
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
