from dataclasses import replace
from typing import Any, Dict, Optional, Tuple

from mmengine.registry import MODELS
from torch import Tensor

from cdm_plugin.draws import DrawContext
from cdm_plugin.flow import add_noise, extrapolate
from cdm_plugin.losses.base import build_sampler
from cdm_plugin.losses.dm_loss import DMLoss
from cdm_plugin.rollout import Prediction

POINTS = ('extrapolated', 'noised', 'on-trajectory')


@MODELS.register_module()
class CDMLoss(DMLoss):
    """Distribution matching off the trajectory: at points extrapolated from the anchor along the student's velocity,
    x_c = x_n + (sigma_c - sigma_n) v_n, through which no gradient flows (arXiv 2605.06376, section 3).

    Args:
        points (str): Where the loss trains the student: 'extrapolated' (the method), or what the paper's ablations put
            in its place: 'noised', the student's x0 at the anchor noised anew to sigma_c, or 'on-trajectory', the
            anchor itself. Default 'extrapolated'.
        point_sigma (dict): Sigma sampler of sigma_c. Default U(0, 1), the published law; AnchorSigma asks an
            anchor-aware fake score only where it was trained.
        guided (bool): Whether the real score carries guidance, so that on- and off-trajectory predictions aim at the
            same, guided distribution. Default False, the published recipe.
        alpha (float): Strength of that guidance; guidance scale s corresponds to alpha = s - 1. Default 7.
        sigma (dict): Sigma sampler of the re-noising. Default UniformSigma.
        min_norm (float): Lower clamp of the normaliser. Default 0.1.
        weight (float): Factor in the student loss. Default 1.
    """

    def __init__(self, point_sigma: Any = dict(type='UniformSigma', low=0.0, high=1.0), guided: bool = False,
                 alpha: float = 7.0, sigma: Any = dict(type='UniformSigma'), min_norm: float = 0.1,
                 weight: float = 1.0, points: str = 'extrapolated') -> None:
        super().__init__(guided, alpha, sigma, min_norm, weight)
        if points not in POINTS:
            raise ValueError(f'model.losses.cdm.points must be one of {POINTS}, but is {points!r}')
        self.points, self.point_sigma = points, build_sampler(point_sigma)

    def draw(self, context: DrawContext) -> Dict[str, Tensor]:
        if self.points == 'on-trajectory':
            return super().draw(context)
        point_sigma = context.sigma(self.point_sigma)
        # A capped law of the re-noising is capped at this loss's own point.
        draws = dict(point_sigma=point_sigma, **super().draw(replace(context, anchor_sigma=point_sigma)))
        if self.points == 'noised':
            draws['point_noise'] = context.noise()
        return draws

    def point(self, anchor: Prediction, draws: Dict[str, Tensor]) -> Optional[Tuple[Tensor, Tensor]]:
        if self.points == 'on-trajectory':
            return None
        to_sigma = draws['point_sigma']
        if self.points == 'noised':
            return add_noise(anchor.x0, draws['point_noise'], to_sigma), to_sigma
        return extrapolate(anchor.x, anchor.velocity.detach(), anchor.sigma, to_sigma), to_sigma
