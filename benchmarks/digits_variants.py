"""Variants of DMD2 that the study on the digits asks about; the `type` of a row names one.

They are for the study alone: one process, full weights, Euler rollouts.
"""
import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from cdm_plugin.condition import Condition
from cdm_plugin.draws import Draws, stream
from cdm_plugin.flow import expand_sigma
from cdm_plugin.losses.base import LossInputs, ScoreQuery
from cdm_plugin.losses.direction import DMLoss
from cdm_plugin.methods.dmd2 import DMD2
from cdm_plugin.methods.phases import Iteration
from cdm_plugin.roles.anchor_aware import make_anchor_aware


class AnchorInput(nn.Module):
    """Shows the fake score the noisy latents that the student's x0 was predicted from: a forward hook of the patch
    projection that adds one of its own, which starts at zero.

    Args:
        patches (nn.Conv2d): The network's patch projection.
    """

    def __init__(self, patches: nn.Conv2d) -> None:
        super().__init__()
        self.projection = nn.Conv2d(patches.in_channels, patches.out_channels, patches.kernel_size, patches.stride,
                                    bias=False)
        nn.init.zeros_(self.projection.weight)
        self.x: Tensor | None = None

    def forward(self, patches: nn.Module, args: Any, output: Tensor) -> Tensor:
        if self.x is None:
            raise RuntimeError("a fake score that sees the anchor's input was called without it")
        return output + self.projection(self.x.to(output.dtype))

    @contextlib.contextmanager
    def at(self, x: Tensor) -> Iterator[None]:
        """Sets the noisy latents, (B, C, h, w), for the calls inside."""
        self.x = x.detach()
        try:
            yield
        finally:
            self.x = None


@MODELS.register_module()
class AnchorInputDMD2(DMD2):
    """DMD2 whose fake score also receives x_n, the student's input at the anchor, as NCVSD's does (arXiv 2506.09416).
    With `PosteriorDMLoss` the teacher hears of x_n too, as there."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        patches = self.fake.pos_embed.proj
        self.fake.anchor_input = AnchorInput(patches)
        patches.register_forward_hook(self.fake.anchor_input)

    def fake_loss_at(self, iteration: Iteration, step: int) -> Tensor:
        with self.fake.anchor_input.at(iteration.anchor.x):
            return super().fake_loss_at(iteration, step)

    def _answered(self, inputs: dict[str, LossInputs]) -> dict[str, LossInputs]:
        with self.fake.anchor_input.at(inputs['dm'].prediction.x):
            return super()._answered(inputs)


@MODELS.register_module()
class PosteriorDMLoss(DMLoss):
    """Distribution matching of the student's x0 given x_n to the teacher's posterior p(x0 | x_n) (NCVSD, arXiv
    2506.09416). Given x0, z and x_n are independent, so the teacher's estimate of x0 from both is its denoiser at one
    point, their mean weighted by precision. The fake score must receive x_n.

    Arguments as in `DMLoss`.
    """

    def queries(self, inputs: LossInputs) -> dict[str, ScoreQuery]:
        found = super().queries(inputs)
        x, sigma = both_observed(found['fake'].x, found['fake'].sigma, inputs.prediction.x, inputs.prediction.sigma)
        return {name: replace(query, x=x, sigma=sigma) if query.role == 'teacher' else query
                for name, query in found.items()}


def both_observed(x: Tensor, sigma: Tensor, other: Tensor, other_sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Where a denoiser knows as much of x0 as two noisy latents do whose noises are independent.

    Args:
        x, other (Tensor): (1 - sigma) x0 + sigma noise, (B, ...).
        sigma, other_sigma (Tensor): Noise levels in (0, 1], not both 1, (B,).

    Returns:
        tuple: Noisy latents (B, ...) and their noise levels (B,).
    """
    precision = ((1 - sigma) / sigma)**2 + ((1 - other_sigma) / other_sigma)**2  # of x0
    total = sum(expand_sigma((1 - s) / s**2, y) * y for y, s in ((x, sigma), (other, other_sigma)))
    level = 1 / (1 + precision.sqrt())
    return expand_sigma((1 - level) / precision, x) * total, level


@MODELS.register_module()
class NextLevelDMD2(DMD2):
    """DMD2 whose student is told which level its step leads to, as an anchor-aware fake score is told the anchor: in
    the rollout, at the anchor and when it samples; 0 at the last one."""
    levels: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        make_anchor_aware(self.student, self.backbone.time_embedder, self.backbone.time_embedding_width())

    def sample_draws(self, *args: Any, **kwargs: Any) -> Draws:
        draws = super().sample_draws(*args, **kwargs)
        self.levels = draws.sigmas
        return draws

    def sample_latents(self, condition: Condition, noise: Tensor | None = None, sigmas: Tensor | None = None,
                       *args: Any, **kwargs: Any) -> Tensor:
        size = None if noise is None else (noise.shape[-2], noise.shape[-1])
        levels = self.shift(self.sample_sigmas if sigmas is None else sigmas, size)
        self.levels = levels.to(self.device, self.math_dtype)
        return super().sample_latents(condition, noise, sigmas, *args, **kwargs)

    def velocity(self, role: str, x: Tensor, sigma: Tensor, condition: Condition,
                 anchor_sigma: Tensor | None = None) -> Tensor:
        if role == 'student':
            anchor_sigma = torch.where(self.levels < sigma[:, None], self.levels, 0.0).amax(1)
        return super().velocity(role, x, sigma, condition, anchor_sigma)


@MODELS.register_module()
class LowAnchorsDMD2(DMD2):
    """DMD2 whose anchors are drawn in proportion to 1 / sigma_n. For sigma samplers that do not look at the anchor."""

    def sample_draws(self, *args: Any, **kwargs: Any) -> Draws:
        draws = super().sample_draws(*args, **kwargs)
        anchor = torch.multinomial(1 / draws.sigmas.cpu(), len(draws.anchor), replacement=True,
                                   generator=stream(self.seed, self.iteration, 'low_anchors'))
        return replace(draws, anchor=anchor.to(self.device), rollout_steps=int(anchor.max()), order=None, moving=None)

    @property
    def extra_forwards(self) -> float:
        """Forwards of a student step beyond those with uniform anchors, in expectation, on a fixed grid."""
        weights = 1 / self.shift(self.time_grid.sample())
        index = torch.arange(len(weights), dtype=weights.dtype)
        return self.student_every * float((weights / weights.sum() * index).sum() - index.mean())
