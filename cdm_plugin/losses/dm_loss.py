from typing import Any, Dict, Tuple

from mmengine.registry import MODELS
from torch import Tensor

from cdm_plugin.draws import DrawContext
from cdm_plugin.flow import add_noise
from cdm_plugin.losses.base import ScoreLoss, ScoreQuery, build_sampler, check_min_norm, clamp_share
from cdm_plugin.losses.functional import dm_loss, reference_norm
from cdm_plugin.rollout import Prediction


@MODELS.register_module()
class DMLoss(ScoreLoss):
    """Distribution matching on the on-trajectory prediction (DMD2, arXiv 2405.14867; 2605.06376, section 3).

    Args:
        guided (bool): Whether the real score carries guidance, D(c) + alpha (D(c) - D(null)), as in DMD2; the
            normaliser then measures against the guided estimate too. Default False: guidance is the CA loss's business.
        alpha (float): Strength of that guidance; guidance scale s corresponds to alpha = s - 1. Default 7.
        sigma (dict): Sigma sampler of the re-noising. Default UniformSigma.
        min_norm (float): Lower clamp of the normaliser. Default 0.1.
        weight (float): Factor in the student loss. Default 1.
    """

    def __init__(self, guided: bool = False, alpha: float = 7.0, sigma: Any = dict(type='UniformSigma'),
                 min_norm: float = 0.1, weight: float = 1.0) -> None:
        super().__init__(weight)
        self.guided, self.alpha, self.sigma = guided, alpha, build_sampler(sigma)
        self.min_norm = check_min_norm(min_norm)

    def draw(self, context: DrawContext) -> Dict[str, Tensor]:
        return dict(sigma=context.sigma(self.sigma), noise=context.noise())

    def queries(self, prediction: Prediction, draws: Dict[str, Tensor]) -> Dict[str, ScoreQuery]:
        z = add_noise(prediction.x0, draws['noise'], draws['sigma'])
        queries = dict(teacher=ScoreQuery('teacher', z, draws['sigma']), fake=ScoreQuery('fake', z, draws['sigma']))
        if self.guided:
            queries['null'] = ScoreQuery('teacher', z, draws['sigma'], null=True)
        return queries

    def forward(self, prediction: Prediction, answers: Dict[str, Tensor]) -> Tuple[Tensor, Dict[str, Tensor]]:
        real = answers['teacher']
        if self.guided:
            real = real + self.alpha * (real - answers['null'])
        loss = dm_loss(prediction.x0, real, answers['fake'], self.min_norm)
        return loss, dict(clamp=clamp_share(reference_norm(prediction.x0, real), self.min_norm))
