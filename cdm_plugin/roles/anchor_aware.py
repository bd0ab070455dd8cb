"""The anchor-aware fake score: a network that is told at which anchor the student's x0 was predicted.

NCVSD (arXiv 2506.09416) tells its own that too, and the noisy input; TDM (2503.06674) needs no telling, because each
step has noise levels of its own.
"""
import contextlib
from collections.abc import Iterator
from typing import Any

from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn

from cdm_plugin.roles.lora import AdapterRole
from cdm_plugin.roles.weights import unwrap


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
        self.sigma: Tensor | None = None

    def forward(self, time_embedding: Tensor) -> Tensor:
        """Adds the embedding of the current anchors to the time embedding, (B, width) or (B, 1, width)."""
        if self.sigma is None:
            raise RuntimeError('an anchor-aware fake score was called without anchor_sigma')
        sinusoid = self.projection(1000 * self.sigma).to(self.embedding.linear_1.weight.dtype)
        return time_embedding + self.embedding(sinusoid).to(time_embedding.dtype).view_as(time_embedding)

    @contextlib.contextmanager
    def at(self, sigma: Tensor | None) -> Iterator[None]:
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


def anchored(network: nn.Module, anchor_sigma: Tensor | None) -> contextlib.AbstractContextManager:
    """Context in which an anchor-aware network knows its anchors' noise levels; does nothing for other networks."""
    embedding = getattr(unwrap(network), 'anchor_embedding', None)
    return contextlib.nullcontext() if embedding is None else embedding.at(anchor_sigma)
