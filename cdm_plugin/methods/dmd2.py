from typing import Any

from mmengine.registry import MODELS

from cdm_plugin.methods.distillation import Distillation


@MODELS.register_module()
class DMD2(Distillation):
    """DMD2 (arXiv 2405.14867): one DM loss whose real score carries guidance, on the inference grid (section 4.4), five
    fake-score steps a student step (section 4.2). Image-free unless the GAN on real pictures (section 4.3) is added,
    `losses=dict(gan=dict(type='GANLoss'))`, as to any method. Rollout and sampling are Euler steps where DMD2 noises x0
    anew.

    Arguments as in `Distillation`.
    """
    default_student_every = 5

    def default_losses(self) -> dict[str, dict[str, Any]]:
        common = dict(alpha=self.alpha, guidance=self.guidance)
        return dict(dm=dict(type='DMLoss', guided=True, **common))
