from typing import Any

from mmengine.registry import MODELS

from cdm_plugin.methods.distillation import Distillation


@MODELS.register_module()
class DecoupledDMD(Distillation):
    """Decoupled DMD (arXiv 2511.22677, eq. 8): guidance and distribution matching as two losses with noise levels of
    their own ("Decoupled-Hybrid", section 4.3), on the inference grid.

    Arguments as in `Distillation`. As its authors do with flow models (issue 78 of Tongyi-MAI/Z-Image), all levels are
    drawn before the scheduler's shift, CA's below the anchor's level as it was then. CDM's authors use the method with
    levels that are never shifted: `sigma_shift='none'`.
    """
    default_student_every = 2
    default_sigma_shift = 'scheduler'

    def default_losses(self) -> dict[str, dict[str, Any]]:
        common = dict(alpha=self.alpha, guidance=self.guidance)
        return dict(ca=dict(type='CALoss', **common), dm=dict(type='DMLoss', **common))
