"""A network in diffusers' way: `from_pretrained` and `save_pretrained` come with ModelMixin."""
from types import SimpleNamespace

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from torch import Tensor, nn


class AcmeTransformer2DModel(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """The smallest network that listens to its time and its condition; put yours in its place.

    Args:
        in_channels (int): Channels of the latents. Default 4.
        sample_size (int): Side of the latents that it was made for. Default 4.
        num_attention_heads (int): Default 2.
        attention_head_dim (int): Channels of a head. Default 4.
        cross_attention_dim (int): Width of the condition's tokens. Default 8.
    """

    @register_to_config
    def __init__(self, in_channels: int = 4, sample_size: int = 4, num_attention_heads: int = 2,
                 attention_head_dim: int = 4, cross_attention_dim: int = 8) -> None:
        super().__init__()
        width = num_attention_heads * attention_head_dim
        self.enter, self.leave = nn.Conv2d(in_channels, width, 1), nn.Conv2d(width, in_channels, 1)
        self.time_embed, self.to_q = nn.Linear(1, width), nn.Linear(cross_attention_dim, width)

    def forward(self, x: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> SimpleNamespace:
        """Velocity of latents x, (B, C, h, w), at timesteps (B,) in [0, 1000], given tokens (B, L, D)."""
        told = self.time_embed(timestep[:, None] / 1000) + self.to_q(encoder_hidden_states.mean(1))
        return SimpleNamespace(sample=self.leave(torch.tanh(self.enter(x) + told[..., None, None])))
