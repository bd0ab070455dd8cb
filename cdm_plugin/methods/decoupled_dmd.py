from typing import Any, Dict

from mmengine.registry import MODELS

from cdm_plugin.methods.distillation import Distillation


@MODELS.register_module()
class DecoupledDMD(Distillation):
    """Decoupled DMD (arXiv 2511.22677): guidance and distribution matching as two losses, on the inference grid.

    Arguments as in `Distillation`.
    """
    default_student_every = 2

    def default_losses(self) -> Dict[str, Dict[str, Any]]:
        return dict(ca=dict(type='CALoss', alpha=self.alpha), dm=dict(type='DMLoss', alpha=self.alpha))
