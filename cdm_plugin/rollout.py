"""Backward simulation: from noise down the time grid to each sample's anchor, with the student, without gradient
(DMD2, arXiv 2405.14867, section 4.5)."""
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cdm_plugin.flow import add_noise, extrapolate, to_x0


@dataclass(frozen=True)
class Prediction:
    """What the student says at one point of a trajectory, on it (the anchor) or off it.

    Attributes:
        x (Tensor): Noisy latents, (B, ...), float32.
        sigma (Tensor): Their noise levels, (B,).
        velocity (Tensor): The student's velocity there, (B, ...).
        x0 (Tensor): The clean latents that it implies, (B, ...), float32.
    """
    x: Tensor
    sigma: Tensor
    velocity: Tensor
    x0: Tensor

    def detach(self) -> 'Prediction':
        """The same values without their graph."""
        return Prediction(self.x.detach(), self.sigma, self.velocity.detach(), self.x0.detach())


@torch.no_grad()
def rollout(velocity: Callable[[Tensor, Tensor, Tensor], Tensor], draws) -> tuple[Tensor, Tensor]:
    """Steps from noise to the anchors: Euler steps or, where the draws have noise for it, x0 noised anew.

    A sample leaves the batch as soon as it has reached its anchor: what comes after is never used. The number of
    network calls is `draws.rollout_steps` on every rank, whatever the rank's own anchors are (a sharded network would
    hang otherwise); a rank whose samples have all arrived keeps one of them in the batch and ignores the answer.

    Args:
        velocity (Callable): (x (K, ...), sigma (K,), index (K,)) -> velocity (K, ...); index says which samples of
            the batch these are.
        draws (Draws): The iteration's random numbers.

    Returns:
        tuple: x_n (B, ...) and sigma_n (B,), float32 (float64 if the noise is).
    """
    x = draws.noise.clone()
    for step, moving in enumerate(draws.moving):
        index = draws.order[:max(moving, 1)]
        sigma, next_sigma = (s.expand(len(index)) for s in draws.sigmas[step:step + 2])
        answer = velocity(x[index], sigma, index)
        if moving and draws.step_noise:
            x[index] = add_noise(to_x0(x[index], answer, sigma), draws.step_noise[step], next_sigma)
        elif moving:
            x[index] = extrapolate(x[index], answer, sigma, next_sigma)
    return x, draws.anchor_sigma
