"""Inference: levels, and Euler steps from noise to clean latents."""
from collections.abc import Callable

import torch
from torch import Tensor

from cdm_plugin.flow import extrapolate


@torch.no_grad()
def euler_sample(velocity: Callable[[Tensor, Tensor], Tensor], noise: Tensor, sigmas: Tensor) -> Tensor:
    """Integrates dx/dsigma = v from the first level to 0, as diffusers' FlowMatchEulerDiscreteScheduler does.

    Args:
        velocity (Callable): (x (B, ...), sigma (B,)) -> velocity (B, ...).
        noise (Tensor): Standard normal noise, (B, ...).
        sigmas (Tensor): Noise levels after the scheduler's shift, descending from 1, (N,); 0 is implied.

    Returns:
        Tensor: Clean latents, (B, ...), float32.
    """
    x = noise
    levels = torch.cat([sigmas, sigmas.new_zeros(1)]).to(noise)
    for sigma, next_sigma in zip(levels[:-1], levels[1:]):
        sigma, next_sigma = sigma.expand(len(x)), next_sigma.expand(len(x))
        x = extrapolate(x, velocity(x, sigma), sigma, next_sigma)
    return x

def step_sigmas(steps: int) -> Tensor:
    """The usual levels of `steps` steps before the scheduler's shift: 1, 1 - 1/steps, ..., 1/steps."""
    if steps < 1:
        raise ValueError(f'steps must be 1 or more, but is {steps}')
    return torch.linspace(1, 1 / steps, steps, dtype=torch.float64)
