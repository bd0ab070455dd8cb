from collections.abc import Mapping
from typing import Any

import torch
from mmengine.registry import METRICS, MODELS
from torch import Tensor

from cdm_plugin.arguments import Count, NotNegative
from cdm_plugin.draws import DrawContext
from cdm_plugin.losses.base import LossInputs, ScoreLoss, Start


@MODELS.register_module()
class RewardLoss(ScoreLoss):
    """Minus what a frozen judge says of the student's decoded x0 at its anchors (ImageReward, arXiv 2304.05977):
    `model.losses.reward=dict(type='RewardLoss', judge=dict(type='PickScore'), weight=0.01)`.

    The judges are metrics of this package; of those that people rate by (PickScore, HPSv2, ImageReward) a student
    learns to please the judge more than the people. Watch it with another one in `val_evaluator`.

    Args:
        judge (dict): Config of the metric; one that is `differentiable`.
        weight (float): Factor in the student loss. The judges differ in scale by a hundred. Default 1.
        start (int): First iteration in which the student minimises it. Default 0.
        crop (int, optional): Side in pixels of a random square that is decoded and judged instead of the picture, for
            memory. Default: the whole picture. Each one's decoding is computed anew in backward.

    Raises:
        ValueError: If the judge gives no gradients.
    """

    def __init__(self, judge: dict[str, Any] | object, weight: NotNegative = 1.0, start: Start = 0,
                 crop: Count | None = None) -> None:
        super().__init__(weight, start)
        self.judge: Any = METRICS.build(dict(judge)) if isinstance(judge, Mapping) else judge
        if not getattr(self.judge, 'differentiable', False):
            fitting = [name for name, cls in METRICS.module_dict.items() if getattr(cls, 'differentiable', False)]
            raise ValueError(f'model.losses.*.judge: {type(self.judge).__name__} gives no gradients, but '
                             f'{", ".join(sorted(fitting))} do')
        self.crop = crop

    def check(self, batch: Mapping[str, Any], backbone: Any) -> None:
        """Loads the judge.

        Raises:
            ValueError: If the batch has no prompts.
            MissingMetric: If a package or weights are missing.
        """
        super().check(batch, backbone)
        if batch.get('prompt') is None:
            raise ValueError(f'RewardLoss (model.losses) reads prompts, but the batch has only {sorted(batch)}: name '
                             "their field in the dataset's pipeline, dict(type='PackInputs', prompt=...)")
        self.judge.prepare()

    def draw(self, context: DrawContext) -> dict[str, Tensor]:
        if self.crop is None:
            return {}
        return dict(place=torch.rand(context.shape[0], 2, generator=context.generator))

    def forward(self, inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
        latents, codec, prompts = inputs.prediction.x0, inputs.codec, inputs.batch['prompt']
        if self.crop is not None:
            from cdm_plugin.codecs import crop_latents  # which registers codecs, a part of its own
            latents = crop_latents(latents, inputs.draws['place'], max(self.crop // codec.scale, 1))
        images = codec.decode_recomputed(latents).float().to(self.judge.device)
        self.judge.prepare()
        reward = self.judge.reward(images, prompts.tolist() if isinstance(prompts, Tensor) else prompts)
        reward = reward.to(latents.device)
        return -reward, dict(reward=reward.detach().mean())
