"""The losses as pure functions of clean-latent estimates. float32 (or float64) throughout.

All three distribution-matching terms become a loss in the same way (arXiv 2605.06376, section 3; DMD2's normaliser):
an update direction delta is scaled by w = 1 / max(mean|reference - x0|, min_norm), per sample, and the student is
regressed onto the constant target x0 + w delta. The gradient with respect to x0 is -2 w delta / numel.
"""
from torch import Tensor

from cdm_plugin.flow import full_precision


def _per_sample_mean(x: Tensor) -> Tensor:
    return x.flatten(1).mean(1)


def reference_norm(x0_student: Tensor, x0_reference: Tensor) -> Tensor:
    """mean|reference - x0| of each sample, before the clamp at min_norm, (B,)."""
    return _per_sample_mean((full_precision(x0_reference) - full_precision(x0_student)).abs()).detach()


def direction_loss(x0_student: Tensor, delta: Tensor, x0_reference: Tensor, min_norm: float = 0.1) -> Tensor:
    """Squared distance of the student's x0 to the constant target x0 + w delta.

    Args:
        x0_student (Tensor): The student's clean latents, with gradient, (B, ...).
        delta (Tensor): Update direction, no gradient flows through it, (B, ...).
        x0_reference (Tensor): The teacher's clean latents for the normaliser, (B, ...).
        min_norm (float): Lower clamp of the normaliser, above 0. Default 0.1.

    Returns:
        Tensor: Loss of each sample, (B,).
    """
    x0 = full_precision(x0_student)
    norm = reference_norm(x0, x0_reference).clamp(min=min_norm)
    scaled = full_precision(delta).detach() / norm.reshape(-1, *[1] * (x0.ndim - 1))
    target = x0.detach() + scaled.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    return _per_sample_mean((x0 - target).square())


def huber_direction_loss(x0_student: Tensor, delta: Tensor, x0_reference: Tensor, c: float,
                         min_norm: float = 0.1) -> Tensor:
    """w mean(sqrt((x0 - target)^2 + c^2) - c) with target = sg[x0 + delta], TDM's pseudo-Huber distance (arXiv
    2503.06674): its gradient with respect to x0, -w delta / sqrt(delta^2 + c^2) / numel, hardly grows with delta.

    Args:
        x0_student, delta, x0_reference, min_norm: See `direction_loss`.
        c (float): Where the distance turns from a square into an absolute value, above 0.

    Returns:
        Tensor: Loss of each sample, (B,).
    """
    x0 = full_precision(x0_student)
    target = x0.detach() + full_precision(delta).detach().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    distance = ((x0 - target).square() + c**2).sqrt() - c
    return _per_sample_mean(distance) / reference_norm(x0, x0_reference).clamp(min=min_norm)


def clamp_share(norm: Tensor, min_norm: float) -> Tensor:
    """Share of samples whose normaliser is clamped, in [0, 1], scalar: high values mean that w has lost its scale."""
    return (norm < min_norm).to(norm.dtype).mean()


def flow_matching_loss(velocity: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    """mean |v - (noise - x0)|^2 of each sample (Lipman et al. 2023, eq. 14, on the straight path).

    Args:
        velocity (Tensor): The network's velocity, with gradient, (B, ...).
        x0 (Tensor): Clean latents, (B, ...).
        noise (Tensor): The noise that was mixed in, (B, ...).

    Returns:
        Tensor: Loss of each sample, (B,).
    """
    target = full_precision(noise) - full_precision(x0)
    return _per_sample_mean((full_precision(velocity) - target).square())
