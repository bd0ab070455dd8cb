from mmengine.registry import MODELS
from torch import Tensor, nn

from cdm_plugin.arguments import Positive
from cdm_plugin.losses.functional import flow_matching_loss


@MODELS.register_module()
class FlowMatchingLoss(nn.Module):
    """mean |v - (noise - x0)|^2: trains the teacher on data and the fake score on the student's x0.

    Args:
        weight (float): Factor. Default 1.
    """

    def __init__(self, weight: Positive = 1.0) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, velocity: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
        """Loss of each sample, (B,); see `flow_matching_loss`."""
        return self.weight * flow_matching_loss(velocity, x0, noise)
