from typing import Any

from mmengine.registry import MODELS
from torch import Tensor, nn

from cdm_plugin.draws import Draws
from cdm_plugin.flow import expand_sigma
from cdm_plugin.losses.direction import check_step_sigma, diffuse_step
from cdm_plugin.losses.gan import GANLoss
from cdm_plugin.methods.distillation import Distillation
from cdm_plugin.rollout import Prediction


@MODELS.register_module()
class TDM(Distillation):
    """Trajectory distribution matching (TDM, arXiv 2503.06674): each step of the inference grid is matched at noise
    levels of its own, between its two ends. So one fake score knows every step's distribution without being told which
    it is. The student's loss is `TDMLoss`, with guidance inside the real score.

    Arguments as in `Distillation`. One fake-score step a student step, as the authors' code.
    """
    default_student_every = 1
    default_fake_sigma = dict(type='StepSigma')

    def default_losses(self) -> dict[str, dict[str, Any]]:
        return dict(dm=dict(type='TDMLoss', alpha=self.alpha, guidance=self.guidance))

    def _build_losses(self, overrides: dict[str, Any]) -> nn.ModuleDict:
        check_step_sigma(self.fake_sigma, 'model.fake_sigma')
        losses = super()._build_losses(overrides)
        for name, loss in losses.items():
            if isinstance(loss, GANLoss):  # head and trunk learn at the levels of `fake_sigma`
                check_step_sigma(loss.sigma, f'model.losses.{name}.sigma')
        return losses

    def fake_point(self, anchor: Prediction, draws: Draws, step: int) -> tuple[Tensor, Tensor, float | Tensor]:
        """The end of the anchor's sampling step, diffused up to the level; the noise in it is partly the student's own,
        so each sample is weighed by how likely that is, per dimension, as in the authors' code. Noised anew, a step's
        end has no noise of the student's."""
        if self.rollout == 'renoise':
            return super().fake_point(anchor, draws, step)
        sigma, fresh = draws.fake_sigma[step], draws.fake_noise[step]
        z = diffuse_step(anchor, fresh, draws.end_sigma, sigma)
        s = expand_sigma(sigma, z)
        noise = (z - (1 - s) * anchor.x0) / s
        energy = (fresh.square() - noise.square()).flatten(1).mean(1)
        return z, noise, (energy / 2).exp()
