from typing import Any, Dict, Tuple

from mmengine.registry import MODELS
from torch import Tensor

from cdm_plugin.draws import DrawContext
from cdm_plugin.flow import add_noise
from cdm_plugin.losses.base import ScoreLoss, ScoreQuery, build_sampler, check_min_norm, clamp_share
from cdm_plugin.losses.functional import ca_loss, reference_norm
from cdm_plugin.rollout import Prediction


@MODELS.register_module()
class CALoss(ScoreLoss):
    """Classifier-free-guidance augmentation on the on-trajectory prediction (arXiv 2511.22677; 2605.06376, section 3).

    Args:
        alpha (float): Strength; guidance scale s corresponds to alpha = s - 1. Default 7, the published recipe.
        sigma (dict): Sigma sampler of the re-noising. Default CappedUniformSigma, the published law; UniformSigma
            gives every anchor the same, consistent guidance (README, "The consistent recipe").
        min_norm (float): Lower clamp of the normaliser. Default 0.1.
        weight (float): Factor in the student loss. Default 1.
    """

    def __init__(self, alpha: float = 7.0, sigma: Any = dict(type='CappedUniformSigma'), min_norm: float = 0.1,
                 weight: float = 1.0) -> None:
        super().__init__(weight)
        self.alpha, self.min_norm, self.sigma = alpha, check_min_norm(min_norm), build_sampler(sigma)

    def draw(self, context: DrawContext) -> Dict[str, Tensor]:
        return dict(sigma=context.sigma(self.sigma), noise=context.noise())

    def queries(self, prediction: Prediction, draws: Dict[str, Tensor]) -> Dict[str, ScoreQuery]:
        z = add_noise(prediction.x0, draws['noise'], draws['sigma'])
        return dict(cond=ScoreQuery('teacher', z, draws['sigma']),
                    null=ScoreQuery('teacher', z, draws['sigma'], null=True))

    def forward(self, prediction: Prediction, answers: Dict[str, Tensor]) -> Tuple[Tensor, Dict[str, Tensor]]:
        loss = ca_loss(prediction.x0, answers['cond'], answers['null'], self.alpha, self.min_norm)
        return loss, dict(clamp=clamp_share(reference_norm(prediction.x0, answers['cond']), self.min_norm))
