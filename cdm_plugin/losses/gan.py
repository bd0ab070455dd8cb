"""A GAN on real pictures: a head on the fake score's features tells the student's samples from the batch's pictures."""
from collections.abc import Sequence
from typing import Any

from mmengine.registry import MODELS
from torch import Tensor, autocast, cat, nn
from torch.nn.functional import softplus

from cdm_plugin.arguments import Count, NotNegative
from cdm_plugin.draws import DrawContext
from cdm_plugin.flow import add_noise
from cdm_plugin.losses.base import LossInputs, Sampler, ScoreLoss, Start, build_sampler


class DiscriminatorHead(nn.Module):
    """Strided convolutions on the feature maps of some blocks, each of which ends in one logit an image: the mean over
    what places are left, so that images of any size go in.

    Args:
        features (int): Channels of the maps, the width of the network.
        blocks (int): Number of maps.
        width (int): Channels inside. Default 256.
    """

    def __init__(self, features: int, blocks: int = 1, width: int = 256) -> None:
        super().__init__()
        self.branches = nn.ModuleList(self._branch(features, width) for _ in range(blocks))

    @staticmethod
    def _branch(features: int, width: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for channels in (features, width, width):
            # Groups of 8 channels or more: one channel at one place would be normalised to nothing.
            layers += [nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.GroupNorm(max(width // 8, 1), width),
                       nn.SiLU()]
        return nn.Sequential(*layers, nn.Conv2d(width, 1, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Logits of real, (B, blocks), of as many maps (B, D, h, w)."""
        dtype = self.branches[0][0].weight.dtype
        # On a CPU in bfloat16, torch 2.13 gives wrong gradients, often infinite ones, of convolutions over one place.
        with autocast('cpu', enabled=False):
            return cat([branch(x.to(dtype)) for branch, x in zip(self.branches, maps)], dim=1)


@MODELS.register_module()
class GANLoss(ScoreLoss):
    """DMD2's GAN (arXiv 2405.14867, section 4.3), for any method: `model.losses.gan=dict(type='GANLoss')` beside an
    entry `discriminator` in `optim_wrapper`, and a dataset with pictures.

    A head on intermediate blocks of the fake score judges the student's x0 and the batch's pictures, both noised:
    softplus(logit of the student's) + softplus(-logit of the picture's). As published

    - the fake score's trunk learns it too: in its own turn it minimises flow matching + `fake_weight` times this;
    - head and trunk learn from the same features, in every fake-score step (two time scales: `model.student_every`),
      here each with its own optimizer: the published gradients of one joint step;
    - the student minimises `weight` softplus(-logit) at its anchors, through the fake score and the head.

    A picture is noised with the level and the noise of the fake-score step's x0 (published: with some of the same
    law; the expectation is the same), so both go through the network in one call.

    Args:
        weight (float): Factor in the student loss. Default 5e-3, as published for SDXL.
        fake_weight (float): Factor in the fake score's loss; 0 leaves its trunk alone. The head's own loss has the
            factor 1. Default 1e-2, as published.
        blocks (Sequence[int], optional): Blocks whose output is judged, in the order of the network; -1 is the last.
            Default: the middle one (published: a U-Net's bottleneck).
        sigma (dict): Sigma sampler of the student's side. Default UniformSigma.
        r1 (float): Weight of the approximate R1 penalty on pictures: the squared difference of the logits of a noised
            picture and of the same with normal noise of `r1_sigma` on it (arXiv 2501.08316). Default 0,
            as published by DMD2.
        r1_sigma (float): See `r1`. Default 0.01.
        width (int): Channels of the head. Default 256.
        start (int): First iteration in which the student minimises it; head and trunk learn from the first on.
            Default 0.
    """
    role = 'discriminator'
    on_fake = True
    real_pictures = True

    def __init__(self, weight: NotNegative = 5e-3, fake_weight: NotNegative = 1e-2,
                 blocks: Sequence[int] | None = None, sigma: Sampler = dict(type='UniformSigma'), r1: NotNegative = 0.0,
                 r1_sigma: NotNegative = 0.01, width: Count = 256, start: Start = 0) -> None:
        super().__init__(weight, start)
        self.fake_weight, self.sigma, self.width = fake_weight, build_sampler(sigma), width
        self.blocks = None if blocks is None else tuple(blocks)
        self.r1, self.r1_sigma = r1, r1_sigma

    def build_role(self, backbone: Any) -> nn.Module:
        return DiscriminatorHead(backbone.width, len(self.blocks or (0,)), self.width)

    def draw(self, context: DrawContext) -> dict[str, Tensor]:
        return dict(sigma=context.sigma(self.sigma), noise=context.noise())

    def forward(self, inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
        noisy = add_noise(inputs.prediction.x0, inputs.draws['noise'], inputs.draws['sigma'])
        logits = inputs.call(self.role, inputs.features(noisy, inputs.draws['sigma']))
        return softplus(-logits).mean(1), dict(fooled=(logits > 0).float().mean())

    def fake_draw(self, context: DrawContext) -> dict[str, Tensor]:
        return dict(r1=context.noise()) if self.r1 else {}

    def fake_points(self, inputs: LossInputs) -> list[Tensor]:
        real = add_noise(inputs.real_latents(), inputs.draws['noise'], inputs.draws['sigma'])
        return [real, real + self.r1_sigma * inputs.draws['r1']] if self.r1 else [real]

    def role_loss(self, inputs: LossInputs) -> Tensor:
        logits = inputs.call(self.role, inputs.seen)
        generated, real, *shaken = logits.chunk(3 if self.r1 else 2)
        loss = softplus(generated).mean() + softplus(-real).mean()
        return loss + self.r1 * (real - shaken[0]).square().mean() if self.r1 else loss
