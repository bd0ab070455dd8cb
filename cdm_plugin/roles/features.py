"""What single blocks of a network give, while it is called as a whole."""
import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from torch import nn


@contextlib.contextmanager
def recorded(blocks: Sequence[nn.Module]) -> Iterator[list[Any]]:
    """Context in which the outputs of some blocks are kept, in the order in which they are called.

    No forward hooks: torch does not look for new ones in a block that is compiled. Activations that are computed anew
    in backward, outside of the context, are not kept a second time; those of the forward pass carry the graph.
    """
    outputs: list[Any] = []
    before = [block._compiled_call_impl for block in blocks]

    def keep(call: Any, *args: Any, **kwargs: Any) -> Any:
        outputs.append(call(*args, **kwargs))
        return outputs[-1]

    try:
        for block, compiled in zip(blocks, before):
            block._compiled_call_impl = partial(keep, compiled or block._call_impl)
        yield outputs
    finally:
        for block, compiled in zip(blocks, before):
            block._compiled_call_impl = compiled
