"""Inference: levels, and steps from noise to clean latents."""
import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from cdm_plugin.draws import stream
from cdm_plugin.flow import add_noise, extrapolate, to_x0


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


@torch.no_grad()
def renoise_sample(velocity: Callable[[Tensor, Tensor], Tensor], noise: Tensor, sigmas: Tensor) -> Tensor:
    """From level to level by noising the estimate of x0 anew (DMD2, arXiv 2405.14867, section 4.4), as diffusers' does
    with `stochastic_sampling`, and FlowMatchLCMScheduler.

    The noise of each step is a function of the sample's first noise, so that an image depends on that alone.

    Args:
        velocity, noise, sigmas: See `euler_sample`.

    Returns:
        Tensor: Clean latents, (B, ...), float32.
    """
    keys = [hashlib.blake2b(row.float().cpu().numpy().tobytes()).hexdigest() for row in noise]
    x0 = x = noise
    for step, sigma in enumerate(sigmas.to(noise)):
        if step:
            fresh = [torch.randn(x0.shape[1:], generator=stream('renoise', key, step)) for key in keys]
            x = add_noise(x0, torch.stack(fresh).to(noise), sigma.expand(len(x)))
        x0 = to_x0(x, velocity(x, sigma.expand(len(x))), sigma.expand(len(x)))
    return x0


def step_sigmas(steps: int) -> Tensor:
    """The usual levels of `steps` steps before the scheduler's shift: 1, 1 - 1/steps, ..., 1/steps."""
    if steps < 1:
        raise ValueError(f'steps must be 1 or more, but is {steps}')
    return torch.linspace(1, 1 / steps, steps, dtype=torch.float64)
