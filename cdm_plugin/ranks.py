"""What the processes of one run do together."""
from collections.abc import Callable
from typing import Any

from mmengine.dist import broadcast_object_list, get_rank


def on_first_rank(function: Callable[[], Any], failed: str) -> Any:
    """Calls a function on rank 0 and returns what it does; None on the other ranks. Every rank must call it.

    Raises:
        Exception: On rank 0, what the function raised; a ValueError on the others, `failed` and what it was.
    """
    result, error = None, None
    if get_rank() == 0:
        try:
            result = function()
        except Exception as raised:  # whatever it is, the others must not wait for it
            error = raised
    message = [None if error is None else f'{failed}: {type(error).__name__}: {error}']
    broadcast_object_list(message)
    if error is not None:
        raise error
    if message[0] is not None:
        raise ValueError(message[0])
    return result
