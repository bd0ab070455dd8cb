"""Mathematics of the straight path, as pure functions.

A network predicts the velocity v = noise - x0 of the path x_sigma = (1 - sigma) x0 + sigma noise, where sigma in
[0, 1] is the noise level: 1 is pure noise, 0 is clean (Lipman et al. 2023). docs/paper.md leads
here from the papers' equations.

All arithmetic runs in float32 whatever the networks run in; float64 stays float64.
"""
from torch import Tensor


def full_precision(x: Tensor) -> Tensor:
    """Half-precision tensors as float32; float32 and float64 as they are."""
    return x if x.is_floating_point() and x.element_size() >= 4 else x.float()


def expand_sigma(sigma: Tensor, x: Tensor) -> Tensor:
    """Reshapes sigma from (B,) to (B, 1, ..., 1) so that it broadcasts over x of shape (B, ...)."""
    if sigma.shape != x.shape[:1]:
        raise ValueError(f'sigma must have shape ({x.shape[0]},), one value a sample, but has {tuple(sigma.shape)}')
    return full_precision(sigma).reshape(-1, *[1] * (x.ndim - 1))


def add_noise(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """x_sigma = (1 - sigma) x0 + sigma noise.

    Args:
        x0 (Tensor): Clean latents, (B, ...).
        noise (Tensor): Standard normal noise, (B, ...).
        sigma (Tensor): Noise levels in [0, 1], (B,).

    Returns:
        Tensor: (B, ...), float32 (float64 if given float64).
    """
    s = expand_sigma(sigma, x0)
    return (1 - s) * full_precision(x0) + s * full_precision(noise)


def to_x0(x: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """D(x, sigma) = x - sigma v(x, sigma): the clean latent that a velocity implies.

    Args:
        x (Tensor): Noisy latents, (B, ...).
        velocity (Tensor): Velocity at (x, sigma), (B, ...).
        sigma (Tensor): Noise levels in [0, 1], (B,).

    Returns:
        Tensor: (B, ...), float32 (float64 if given float64).
    """
    return full_precision(x) - expand_sigma(sigma, x) * full_precision(velocity)


def extrapolate(x: Tensor, velocity: Tensor, sigma: Tensor, to_sigma: Tensor) -> Tensor:
    """x + (to_sigma - sigma) v: along the velocity to another noise level.

    Between neighbours of a time grid this is the Euler step; from an anchor to any sigma it gives the off-trajectory
    point of the CDM loss (arXiv 2605.06376, section 3).

    Args:
        x (Tensor): Latents at sigma, (B, ...).
        velocity (Tensor): Velocity at (x, sigma), (B, ...).
        sigma (Tensor): Noise levels of x in [0, 1], (B,).
        to_sigma (Tensor): Noise levels to reach in [0, 1], (B,).

    Returns:
        Tensor: (B, ...), float32 (float64 if given float64).
    """
    step = expand_sigma(to_sigma, x) - expand_sigma(sigma, x)
    return full_precision(x) + step * full_precision(velocity)


def diffuse(x: Tensor, noise: Tensor, sigma: Tensor, to_sigma: Tensor) -> Tensor:
    """a x + sqrt(to_sigma^2 - a^2 sigma^2) noise with a = (1 - to_sigma) / (1 - sigma): the forward process from one
    noise level to a higher one. What has the path's distribution at `sigma` has it at `to_sigma`.

    Args:
        x (Tensor): Latents at sigma, (B, ...).
        noise (Tensor): Standard normal noise, (B, ...).
        sigma (Tensor): Noise levels of x in [0, 1), (B,).
        to_sigma (Tensor): Noise levels to reach, in [sigma, 1], (B,).

    Returns:
        Tensor: (B, ...), float32 (float64 if given float64).
    """
    low, high = expand_sigma(sigma, x), expand_sigma(to_sigma, x)
    a = (1 - high) / (1 - low)
    added = ((high - a * low) * (high + a * low)).clamp(min=0).sqrt()  # rounding may bring 0 below it
    return a * full_precision(x) + added * full_precision(noise)


def shift_sigmas(sigmas: Tensor, shift: float) -> Tensor:
    """sigma' = shift sigma / (1 + (shift - 1) sigma), the resolution shift of SD3 (Esser et al. 2024, eq. 23).

    Diffusers' dynamic exponential shift with parameter mu is the same map with shift = exp(mu).

    Args:
        sigmas (Tensor): Noise levels in [0, 1], any shape.
        shift (float): Above 1 moves levels towards noise.

    Returns:
        Tensor: Shifted noise levels, same shape.
    """
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def stretch_sigmas(sigmas: Tensor, last: float) -> Tensor:
    """Stretches a list of noise levels towards its end, which becomes `last`; 1 stays 1.

    What diffusers' schedulers do with `shift_terminal`. The list that is 1 alone stays as it is.

    Args:
        sigmas (Tensor): Noise levels, descending from 1, (N,).
        last (float): The level that it shall end at, in (0, 1).

    Returns:
        Tensor: (N,).
    """
    return sigmas if len(sigmas) == 1 else 1 - (1 - sigmas) * (1 - last) / (1 - sigmas[-1])
