from collections.abc import Mapping
from typing import Any

import torch
from mmengine.registry import MODELS
from torch import Tensor

from cdm_plugin.arguments import NotNegative
from cdm_plugin.losses.base import LossInputs, ScoreLoss, Start


@MODELS.register_module()
class RegressionLoss(ScoreLoss):
    """DMD's regression (arXiv 2311.18828) onto pairs of noise and the teacher's sample of it, which `cdm
    pairs` makes and `PairDataset` reads: mean |D_student(noise, 1) - sample|^2, in latents.

    The published distance is LPIPS between decoded images. Squares in latents need neither codec nor network, but they
    pull a student whose first step cannot reach its pair towards a mean of them.

    Args:
        weight (float): Factor in the student loss. Default 0.25, as published for LPIPS.
        start (int): First iteration in which the student minimises it. Default 0.
    """

    def __init__(self, weight: NotNegative = 0.25, start: Start = 0) -> None:
        super().__init__(weight, start)

    def check(self, batch: Mapping[str, Any], backbone: Any) -> None:
        super().check(batch, backbone)
        if batch.get('pair_noise') is None:
            raise ValueError(f'RegressionLoss (model.losses) needs pairs, but the batch has only {sorted(batch)}: make '
                             "them with `cdm pairs`, and set train_dataloader.dataset=dict(type='PairDataset', ...)")
        channels = batch['pair_noise'].shape[1]
        if channels != backbone.latent_channels:
            raise ValueError(f'the pairs of train_dataloader.dataset have {channels} channels, but the latents of '
                             f'model.backbone {backbone.latent_channels}: another model made them')

    def point(self, inputs: LossInputs) -> tuple[Tensor, Tensor]:
        return inputs.batch['pair_noise'], torch.ones_like(inputs.prediction.sigma)

    def forward(self, inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
        return (inputs.prediction.x0 - inputs.batch['pair_latents']).square().flatten(1).mean(1), {}
