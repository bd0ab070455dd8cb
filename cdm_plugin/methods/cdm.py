from typing import Any, Dict

from mmengine.registry import MODELS

from cdm_plugin.methods.distillation import Distillation


@MODELS.register_module()
class CDM(Distillation):
    """Continuous-time distribution matching (arXiv 2605.06376): a dynamic time grid, and a loss off the trajectory.

    Arguments as in `Distillation`. The defaults are the published recipe.
    """
    default_student_every = 2
    default_fake_merge = 0.001

    def default_time_grid(self) -> Dict[str, Any]:
        return dict(type='DynamicTimeGrid')

    def default_losses(self) -> Dict[str, Dict[str, Any]]:
        return dict(ca=dict(type='CALoss', alpha=self.alpha), dm=dict(type='DMLoss', alpha=self.alpha),
                    cdm=dict(type='CDMLoss', alpha=self.alpha))
