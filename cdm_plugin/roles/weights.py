"""Weights of a role's network, whatever wraps it: a data-parallel wrapper, or an engine that shards them."""
from collections.abc import Mapping

import torch
from torch import Tensor, nn


def unwrap(network: nn.Module) -> nn.Module:
    """The network itself, without a data-parallel wrapper or a sharding engine (they all call it `module`)."""
    return network.module if hasattr(network, 'module') else network


def dtype_of(network: nn.Module) -> torch.dtype:
    """Dtype of a network's weights; of its base's, for an adapter."""
    network = unwrap(network)
    return network.dtype if hasattr(network, 'dtype') else next(network.parameters()).dtype


def full_weights(network: nn.Module) -> dict[str, Tensor]:
    """The weights of a network at full precision, by name, as far as this process keeps them: all of them or, under
    a sharding engine, this rank's pieces, flat. After a change in place, call `refresh`."""
    shards = getattr(network, 'weight_shards', None)
    return dict(unwrap(network).named_parameters()) if shards is None else shards.weights


def refresh(network: nn.Module) -> None:
    """Brings changed `full_weights` into what the network computes with. Every rank must call it."""
    shards = getattr(network, 'weight_shards', None)
    if shards is not None:
        shards.refresh()


@torch.no_grad()
def first_not_finite(weights: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor with a value that is not finite, or None if there is none."""
    floating = {name: w for name, w in weights.items() if w.is_floating_point() and w.numel()}
    if not floating:
        return None
    # The extremes are NaN if any value is; nothing of the tensors' own size is made.
    fine = torch.stack([torch.stack(w.aminmax()).isfinite().all() for w in floating.values()]).tolist()
    return next((name for name, finite in zip(floating, fine) if not finite), None)


@torch.no_grad()
def merge_weights(target: nn.Module, source: nn.Module, rate: float | Tensor) -> None:
    """target = (1 - rate) target + rate source, for the parameters that both have.

    Sharded networks merge piece by piece in float32 (a rate of 0.001 is lost in bfloat16); nothing is gathered.

    Of LoRA adapters it mixes A and B apart, while the weighted mean of the products B A is meant. That mean has twice
    the rank, so no merge of adapters is exact. With f the target's and s the source's, a merge leaves out

        rate (1 - rate) (B_s - B_f)(A_s - A_f),

    which is second order in what the two have learnt apart since they started from one A (`LoRA` sees to that; with an
    A for each role it would be as large as the merge itself). Errors do not add up: after any number of merges the
    product lies off exact merging by a moving mean of (B_s - B_f)(A_s - A_f) over the last 1 / rate merges, so by less
    than the largest of them. Roles that are merged and not trained end as the source exactly, which the projection
    onto the nearest product of the same rank does not promise.

    Args:
        target (nn.Module): The fake score's network.
        source (nn.Module): The student's network.
        rate (float or Tensor): In [0, 1]; a 0-dim tensor where only the device knows whether to merge.
    """
    source_weights = full_weights(source)
    pairs = [(p, source_weights[name]) for name, p in full_weights(target).items() if name in source_weights]
    if pairs:  # a rank may own no piece that both have
        lerp_all([p for p, _ in pairs], [q.to(p.dtype) for p, q in pairs], rate)
    refresh(target)


def lerp_all(tensors: list[Tensor], towards: list[Tensor], weight: float | Tensor) -> None:
    """tensor = tensor + weight (towards - tensor) in place, for each pair; the weight may be a 0-dim tensor."""
    if isinstance(weight, Tensor):
        for tensor, other in zip(tensors, towards):
            tensor.lerp_(other, weight.to(tensor))
    else:
        torch._foreach_lerp_(tensors, towards, weight)
