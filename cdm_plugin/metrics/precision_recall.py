"""Improved precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991)."""

import torch
from torch import Tensor

from cdm_plugin.metrics.frechet import checked_features


def precision_recall(features: Tensor, reference: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """How much of the samples lies in the reference's manifold, and the other way round (sections 3 and 3.1).

    A set's manifold is the union of balls around its samples, each as large as the distance to its k-th nearest
    neighbour in the same set.

    Args:
        features (Tensor): Of the samples, (N, D).
        reference (Tensor): Of the reference, (M, D).
        neighbours (int): k. Default 3, the paper's.

    Returns:
        tuple[float, float]: Precision and recall, in [0, 1].

    Raises:
        ValueError: The shapes do not fit, values are not finite, or a set has no k-th neighbour.
    """
    a, b = checked_features(features, 'features'), checked_features(reference, 'reference')
    if a.shape[1] != b.shape[1]:
        raise ValueError(f'features and reference must be as wide, but have {a.shape[1]} and {b.shape[1]} columns')
    if not 1 <= neighbours < min(len(a), len(b)):
        raise ValueError(f'neighbours must lie in 1..{min(len(a), len(b)) - 1} for sets of {len(a)} and {len(b)}, but '
                         f'is {neighbours}')
    between = _distances(a, b)  # (N, M)
    precision = (between <= _radii(b, neighbours)[None]).any(1)
    recall = (between <= _radii(a, neighbours)[:, None]).any(0)
    return precision.double().mean().item(), recall.double().mean().item()


def _radii(features: Tensor, neighbours: int) -> Tensor:
    # The nearest is the sample itself, at distance 0.
    return _distances(features, features).kthvalue(neighbours + 1, dim=1).values


def _distances(a: Tensor, b: Tensor) -> Tensor:
    # By differences: the product form makes equal rows differ.
    return torch.cdist(a, b, compute_mode='donot_use_mm_for_euclid_dist')
