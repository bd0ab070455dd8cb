"""The Fréchet distance between two sets of features."""
import torch
from torch import Tensor


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Fréchet distance between the Gaussians fitted to two sets of features, in float64.

    ``|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))``: eq. 6 of Heusel et al., "GANs Trained by a Two Time-Scale
    Update Rule Converge to a Local Nash Equilibrium", 2017, after Dowson and Landau, 1982. It is a squared distance:
    its unit is the square of the features' unit. Means and covariances are the samples' own (ddof=1), so two finite
    samples of one distribution lie above 0, the more so the fewer they are.

    Args:
        features_a (Tensor): (N, D), a tensor or an array, N >= 2.
        features_b (Tensor): (M, D), M >= 2.

    Returns:
        float: The distance, >= 0.

    Raises:
        ValueError: A set is not two-dimensional, has fewer than 2 samples or holds NaN or infinity, or the two
            differ in D.
    """
    a, b = checked_features(features_a, 'features_a'), checked_features(features_b, 'features_b')
    if a.shape[1] != b.shape[1]:
        raise ValueError(f'features_a and features_b must have the same width, got {a.shape[1]} and {b.shape[1]}: '
                         'take both from the same classifier')
    cov_a, cov_b = _covariance(a), _covariance(b)
    # The eigenvalues of C_a C_b are the squared singular values of C_a^(1/2) C_b^(1/2). Taking the latter directly
    # never leaves the reals, and never takes the root of a rounding error where a covariance is singular.
    trace_of_root = torch.linalg.svdvals(_symmetric_sqrt(cov_a) @ _symmetric_sqrt(cov_b)).sum()
    mean_term = (a.mean(0) - b.mean(0)).square().sum()
    distance = mean_term + cov_a.trace() + cov_b.trace() - 2 * trace_of_root
    return max(distance.item(), 0.)  # equal sets come out at +-1e-15


def checked_features(features: Tensor, name: str) -> Tensor:
    """A set of features, (N, D), as float64 on the CPU; anything else is refused by `name`."""
    # .cpu() before .double(): some accelerators have no float64
    features = torch.as_tensor(features).detach().cpu().double()
    if features.ndim != 2:
        raise ValueError(f'{name} must have shape (N, D), got {tuple(features.shape)}')
    if len(features) < 2:
        raise ValueError(f'{name} needs at least 2 samples to have a covariance, got {len(features)}')
    bad = (~features.isfinite()).any(dim=1).sum().item()
    if bad:
        raise ValueError(f'{name} must be finite, but {bad} of its {len(features)} rows hold NaN or infinity')
    return features


def _covariance(features: Tensor) -> Tensor:
    centred = features - features.mean(0)
    return centred.T @ centred / (len(features) - 1)


def _symmetric_sqrt(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
