from typing import Any

from mmengine.registry import MODELS

from cdm_plugin.methods.distillation import Distillation


@MODELS.register_module()
class CDM(Distillation):
    """Continuous-time distribution matching (arXiv 2605.06376): a dynamic time grid, and a loss off the trajectory.

    Arguments as in `Distillation`. The defaults are the published recipe.
    """
    default_student_every = 2
    default_fake_merge = 0.001

    def default_time_grid(self) -> dict[str, Any]:
        return dict(type='DynamicTimeGrid')

    def default_losses(self) -> dict[str, dict[str, Any]]:
        common = dict(alpha=self.alpha, guidance=self.guidance)
        return dict(ca=dict(type='CALoss', **common), dm=dict(type='DMLoss', **common),
                    cdm=dict(type='CDMLoss', **common))
