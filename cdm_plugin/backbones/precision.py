"""What networks of diffusers round on the way, in half precision, where it costs nothing to keep it."""
import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn


@contextlib.contextmanager
def unrounded(sinusoids: nn.Module, values: Sequence[Tensor]) -> Iterator[None]:
    """Context in which the next calls of a network's sinusoids get what they are of as it is.

    Flux and its kin bring time and guidance to the dtype of their tokens before they take sinusoids of them. Between
    512 and 1024, where most of 1000 sigma lies, bfloat16 has every fourth whole number.

    Args:
        sinusoids (nn.Module): The network's diffusers Timesteps.
        values (Sequence[Tensor]): What they take, call by call, each (B,), float32 or wider.
    """
    left = list(values)

    def replace(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        value = left.pop(0)
        return (value if value.dtype.itemsize > args[0].dtype.itemsize else args[0], *args[1:])

    handle = sinusoids.register_forward_pre_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def keep_norms_exact(network: nn.Module) -> nn.Module:
    """A network whose torch.nn.RMSNorm take their input in the dtype of their weights: under autocast queries and keys
    come in bfloat16, the weights stay in float32, and torch has no fused kernel for two dtypes and rounds twice."""
    for module in network.modules():
        if type(module) is nn.RMSNorm and module.weight is not None:
            module.register_forward_pre_hook(_in_weights_dtype)
    return network


def _in_weights_dtype(norm: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    return (args[0].to(norm.weight.dtype),)
