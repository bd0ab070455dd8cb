"""What a role's network needs beyond diffusers': to know the anchor, to be merged, to be found under its wrappers.

A role is a network of its own, or an adapter of a shared one (lora.py); nothing here depends on which.
"""
import contextlib
from typing import Any, Dict, Iterator, Optional

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn

from cdm_plugin.lora import AdapterRole


class AnchorEmbedding(nn.Module):
    """Tells the fake score at which anchor the student's x0 was predicted.

    One fake score otherwise models the mixture over all anchors, and distribution matching holds on average only.
    The embedding of the anchor's noise level is added to the network's time embedding; its last layer starts at zero,
    so that the fake score starts as the teacher.

    Args:
        width (int): Width of the network's time embedding.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.projection = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.embedding = TimestepEmbedding(256, width)
        nn.init.zeros_(self.embedding.linear_2.weight)
        nn.init.zeros_(self.embedding.linear_2.bias)
        self.sigma: Optional[Tensor] = None

    def forward(self, time_embedding: Tensor) -> Tensor:
        """Adds the embedding of the current anchors to the time embedding, (B, width)."""
        if self.sigma is None:
            raise RuntimeError('an anchor-aware fake score was called without anchor_sigma')
        sinusoid = self.projection(1000 * self.sigma).to(self.embedding.linear_1.weight.dtype)
        return time_embedding + self.embedding(sinusoid).to(time_embedding.dtype)

    @contextlib.contextmanager
    def at(self, sigma: Optional[Tensor]) -> Iterator[None]:
        """Sets the anchors' noise levels, (B,), for the calls inside."""
        self.sigma = sigma
        try:
            yield
        finally:
            self.sigma = None


class _AddAnchor:
    """Forward hook; an object rather than a closure, so that a copy of the network uses the copied embedding."""

    def __init__(self, embedding: AnchorEmbedding) -> None:
        self.embedding = embedding

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return self.embedding(output)


def make_anchor_aware(network: nn.Module, time_embedder: str, width: int) -> None:
    """Adds an `AnchorEmbedding` to a network, as its submodule `anchor_embedding`.

    Args:
        network (nn.Module): The fake score's network.
        time_embedder (str): Name of the submodule whose output is the time embedding.
        width (int): Width of the time embedding.
    """
    parameter = next(network.parameters())
    network.anchor_embedding = AnchorEmbedding(width).to(parameter.device, parameter.dtype)
    hook = _AddAnchor(network.anchor_embedding)
    if isinstance(network, AdapterRole):
        network.add_hook(time_embedder, hook)
    else:
        network.get_submodule(time_embedder).register_forward_hook(hook)


def anchored(network: nn.Module, anchor_sigma: Optional[Tensor]) -> contextlib.AbstractContextManager:
    """Context in which an anchor-aware network knows its anchors' noise levels; does nothing for other networks."""
    embedding = getattr(unwrap(network), 'anchor_embedding', None)
    return contextlib.nullcontext() if embedding is None else embedding.at(anchor_sigma)


def unwrap(network: nn.Module) -> nn.Module:
    """The network itself, without a data-parallel wrapper or a sharding engine (they all call it `module`)."""
    return network.module if hasattr(network, 'module') else network


def dtype_of(network: nn.Module) -> torch.dtype:
    """Dtype of a network's weights; of its base's, for an adapter."""
    network = unwrap(network)
    return network.dtype if hasattr(network, 'dtype') else next(network.parameters()).dtype


def full_weights(network: nn.Module) -> Dict[str, Tensor]:
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
def merge_weights(target: nn.Module, source: nn.Module, rate: float) -> None:
    """target = (1 - rate) target + rate source, for the parameters that both have.

    Sharded networks merge piece by piece in float32 (a rate of 0.001 is lost in bfloat16); nothing is gathered.

    Args:
        target (nn.Module): The fake score's network.
        source (nn.Module): The student's network.
        rate (float): In [0, 1].
    """
    source_weights = full_weights(source)
    pairs = [(p, source_weights[name]) for name, p in full_weights(target).items() if name in source_weights]
    if pairs:  # a rank may own no piece that both have
        torch._foreach_lerp_([p for p, _ in pairs], [q.to(p.dtype) for p, q in pairs], rate)
    refresh(target)
