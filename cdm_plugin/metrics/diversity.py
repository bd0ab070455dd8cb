"""How much the images of one prompt differ."""
import torch
from mmengine.registry import METRICS
from torch import Tensor

from cdm_plugin.metrics.features import FeatureMetric, Space


@METRICS.register_module()
class Diversity(FeatureMetric):
    """Mean over prompts of the mean distance between the images of one prompt; higher is more diverse.

    It needs several images a prompt, each with a `draw` of its own; prompts with one image are left out. In CLIP's
    space the distance is between unit vectors, from 0 to 2. The result is `diversity`.

    Args:
        space (str): 'clip' or 'inception'. Default 'clip'.
        pretrained (str, optional): As of `FeatureMetric`.
        **kwargs: Of `ImageMetric`.
    """

    key = 'diversity'

    def __init__(self, space: Space = 'clip', pretrained: str | None = None, **kwargs) -> None:
        super().__init__(space=space, pretrained=pretrained, **kwargs)

    def value(self, rows: Tensor, prompts: list, index: Tensor) -> dict[str, float]:
        return {self.key: mean_distance_within(rows, index)}


def mean_distance_within(features: Tensor, groups: Tensor) -> float:
    """Mean over groups of the mean Euclidean distance between different rows of a group.

    Args:
        features (Tensor): (N, D).
        groups (Tensor): int (N,), the group of each row; groups of one row are left out.

    Raises:
        ValueError: No group has two rows.
    """
    means = [torch.pdist(features[groups == group].double()).mean() for group in groups.unique()
             if (groups == group).sum() > 1]
    if not means:
        raise ValueError(f'diversity needs two images of a prompt at least, got {len(features)} images of as many '
                         'prompts: make several a prompt, each with a `draw` of its own')
    return torch.stack(means).mean().item()
