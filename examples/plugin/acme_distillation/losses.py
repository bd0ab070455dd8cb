"""Two terms of the student loss: one with a frozen judge, one that trains a network of its own."""
from typing import Any

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn.functional import softplus

from cdm_plugin.backbones import Backbone
from cdm_plugin.codecs import crop_latents
from cdm_plugin.draws import DrawContext
from cdm_plugin.flow import add_noise
from cdm_plugin.losses import LossInputs, ScoreLoss


@MODELS.register_module()
class AcmeRewardLoss(ScoreLoss):
    """Minus what a frozen judge says of the decoded sample.

    Args:
        side (int, optional): Side of the crop of latents that is decoded, which saves memory. Default: all of them.
        **kwargs: `weight` and `start`, as every loss has them.
    """

    def __init__(self, side: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.side = side
        self.judge = nn.Conv2d(1, 1, 1).requires_grad_(False)  # yours is loaded here
        nn.init.constant_(self.judge.weight, 2.0)
        nn.init.constant_(self.judge.bias, 0.25)

    def draw(self, context: DrawContext) -> dict[str, Tensor]:
        """Where the crops lie: every random number comes from here, so that a resumed run repeats them."""
        return dict(place=torch.rand(context.shape[0], 2, generator=context.generator))

    def forward(self, inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
        latents = inputs.prediction.x0
        if self.side is not None:
            latents = crop_latents(latents, inputs.draws['place'], self.side)
        reward = self.judge(inputs.codec.decode_recomputed(latents)).flatten(1).mean(1)
        return -reward, dict(reward=reward.detach().mean())


@MODELS.register_module()
class AcmeGANLoss(ScoreLoss):
    """Both sides of a GAN on noised latents: `role` is a network that this loss builds, trained as any other role. It
    has an entry `discriminator` in `optim_wrapper`."""
    role, role_every = 'discriminator', 2  # trained every second iteration
    real_pictures = True  # said before training if the dataset has none

    def build_role(self, backbone: Backbone) -> nn.Module:
        return nn.Sequential(nn.Conv2d(backbone.latent_channels, 8, 3, padding=1), nn.SiLU(),
                             nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 1))

    def draw(self, context: DrawContext) -> dict[str, Tensor]:
        return dict(noise=context.noise())

    def role_draw(self, context: DrawContext) -> dict[str, Tensor]:
        return dict(noise=context.noise())

    def forward(self, inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
        """The student's side: -log D of its x0, noised."""
        return softplus(-self._scores(inputs, inputs.prediction.x0)), {}

    def role_loss(self, inputs: LossInputs) -> Tensor:
        """The discriminator's side, of both kinds in one call."""
        both = torch.stack([inputs.real_latents(), inputs.prediction.x0])
        real, fake = self._scores(inputs, both.flatten(0, 1)).chunk(2)
        return softplus(-real).mean() + softplus(fake).mean()

    def _scores(self, inputs: LossInputs, latents: Tensor) -> Tensor:
        repeats = len(latents) // len(inputs.prediction.sigma)
        noise = inputs.draws['noise'].repeat(repeats, 1, 1, 1)
        noisy = add_noise(latents, noise, torch.full_like(inputs.prediction.sigma, 0.3).repeat(repeats))
        return inputs.call('discriminator', noisy).squeeze(1)
