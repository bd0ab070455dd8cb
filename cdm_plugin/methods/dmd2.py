from typing import Any, Dict

from mmengine.registry import MODELS

from cdm_plugin.methods.distillation import Distillation


@MODELS.register_module()
class DMD2(Distillation):
    """DMD2 (arXiv 2405.14867) in its image-free form: one DM loss whose real score carries guidance, on the inference
    grid, five fake-score steps a student step. The optional GAN loss on real images is not part of it.

    Arguments as in `Distillation`.
    """
    default_student_every = 5

    def default_losses(self) -> Dict[str, Dict[str, Any]]:
        return dict(dm=dict(type='DMLoss', guided=True, alpha=self.alpha))
