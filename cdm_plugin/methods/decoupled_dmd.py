from typing import Any

from mmengine.registry import MODELS

from cdm_plugin.methods.distillation import Distillation


@MODELS.register_module()
class DecoupledDMD(Distillation):
    """Decoupled DMD (arXiv 2511.22677, eq. 8): guidance and distribution matching as two losses with noise levels of
    their own ("Decoupled-Hybrid", section 4.3), on the inference grid.

    Arguments as in `Distillation`.
    """
    default_student_every = 2

    def default_losses(self) -> dict[str, dict[str, Any]]:
        common = dict(alpha=self.alpha, guidance=self.guidance)
        return dict(ca=dict(type='CALoss', **common), dm=dict(type='DMLoss', **common))
