"""How far a set of images lies from a reference set: FID, KID, precision and recall."""
from mmengine.registry import METRICS
from torch import Tensor

from cdm_plugin.metrics.features import ReferenceMetric
from cdm_plugin.metrics.frechet import checked_features, frechet_distance
from cdm_plugin.metrics.precision_recall import precision_recall

BLOCK = 1000
"""Rows of a kernel matrix that are in memory at a time."""


@METRICS.register_module()
class FID(ReferenceMetric):
    """Fréchet Inception distance to a reference (`frechet_distance` of `InceptionJudge`'s features); lower is better.

    It falls with the number of images: compare only equal numbers. 50,000 (or COCO's 30,000) are usual; below 2,048
    the covariances are singular and the number has no relation to published ones. Heusel et al., 2017. The result is
    `fid`, for another space than Inception's `fd_clip`.

    Args:
        reference (str): A folder of pictures, or an npz with `features` (M, 2048).
        **kwargs: Of `FeatureMetric`.
    """

    key = 'fid'
    higher_is_better = False

    def least_images(self) -> int:
        return 0 if self.reference is None else self.reference.shape[1] + 1

    def value(self, rows: Tensor, prompts: list, index: Tensor) -> dict[str, float]:
        return {self.key if self.space == 'inception' else 'fd_clip': frechet_distance(rows, self.reference)}


@METRICS.register_module()
class KID(ReferenceMetric):
    """Kernel Inception distance to a reference, unbiased, so that few images do; lower is better.

    See `kernel_distance`. It is the whole sets' estimate, of which the published mean over subsets has the same
    expectation and a larger variance. Papers often print it times 1000. The result is `kid`.

    Args:
        reference (str): A folder of pictures, or an npz with `features` (M, 2048).
        **kwargs: Of `FeatureMetric`.
    """

    key = 'kid'
    higher_is_better = False

    def value(self, rows: Tensor, prompts: list, index: Tensor) -> dict[str, float]:
        return {self.key: kernel_distance(rows, self.reference)}


@METRICS.register_module()
class PrecisionRecall(ReferenceMetric):
    """Share of the images in the reference's manifold, and of the reference in the images'; higher is better.

    See `precision_recall`. The paper takes features of VGG-16; here they are Inception's or CLIP's, so numbers are
    not comparable to published ones. The results are `precision` and `recall`, in [0, 1].

    Args:
        reference (str): A folder of pictures, or an npz with `features` (M, D).
        neighbours (int): k. Default 3, the paper's.
        **kwargs: Of `FeatureMetric`.
    """

    key = 'precision'

    def __init__(self, reference: str, neighbours: int = 3, **kwargs) -> None:
        super().__init__(reference, **kwargs)
        self.neighbours = neighbours

    def value(self, rows: Tensor, prompts: list, index: Tensor) -> dict[str, float]:
        precision, recall = precision_recall(rows, self.reference, self.neighbours)
        return dict(precision=precision, recall=recall)


def kernel_distance(features: Tensor, reference: Tensor) -> float:
    """Unbiased squared maximum mean discrepancy under the kernel ``(x y / D + 1)^3``, in float64.

    Bińkowski et al., "Demystifying MMD GANs", 2018, section 4 and eq. 4 (Gretton et al.'s estimator); it may be
    negative where the sets are alike.

    Args:
        features (Tensor): (N, D), N >= 2.
        reference (Tensor): (M, D), M >= 2.

    Raises:
        ValueError: As `frechet_distance`.
    """
    a, b = checked_features(features, 'features'), checked_features(reference, 'reference')
    if a.shape[1] != b.shape[1]:
        raise ValueError(f'features and reference must be as wide, but have {a.shape[1]} and {b.shape[1]} columns')
    between = _kernel_sum(a, b) / (len(a) * len(b))
    return (_mean_of_pairs(a) + _mean_of_pairs(b) - 2 * between).item()


def _kernel_sum(a: Tensor, b: Tensor) -> Tensor:
    return sum((rows @ b.T / b.shape[1] + 1).pow(3).sum() for rows in a.split(BLOCK))


def _mean_of_pairs(a: Tensor) -> Tensor:
    """Mean of the kernel over pairs of different samples."""
    diagonal = (a.square().sum(1) / a.shape[1] + 1).pow(3).sum()
    return (_kernel_sum(a, a) - diagonal) / (len(a) * (len(a) - 1))
