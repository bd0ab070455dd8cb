from collections.abc import Sequence
from functools import partial
from typing import Any

from mmengine.registry import MODELS
from torch import Tensor

from cdm_plugin.arguments import Share
from cdm_plugin.backbones import Backbone
from cdm_plugin.draws import FlowMatchingDraws
from cdm_plugin.flow import add_noise
from cdm_plugin.losses.base import Sampler, build_sampler
from cdm_plugin.methods.base import DiffusionModel
from cdm_plugin.methods.overrides import leave_aside
from cdm_plugin.methods.phases import Iteration, Phase
from cdm_plugin.sizes import Size


@MODELS.register_module()
class FlowMatching(DiffusionModel):
    """Trains or fine-tunes a teacher on images (Lipman et al. 2023; Esser et al. 2024). Its one network has the role
    'student', so that optimizer, EMA, sampling and export are the same as in distillation.

    Args:
        backbone (dict): Config of the backbone; `config` for a new network, `pretrained` to fine-tune one.
        sigma (dict): Sigma sampler; the scheduler's shift is applied to its draws. Default LogitNormalSigma.
        drop_rate (float): Share of samples trained with the null condition, for classifier-free guidance, in [0, 1].
            Default 0.1.
        loss (dict): Loss of the velocity. Default FlowMatchingLoss.
        sample_sigmas, image_size, activation_checkpointing, lora, data_preprocessor: See `DiffusionModel`.
        **siblings: What only other methods take, left aside: changing `model.type` alone swaps methods.
    """

    def __init__(self, backbone: dict[str, Any] | Backbone, sigma: Sampler = dict(type='LogitNormalSigma'),
                 drop_rate: Share = 0.1, loss: dict[str, Any] = dict(type='FlowMatchingLoss'),
                 sample_sigmas: Sequence[float] = (1.0, 0.75, 0.5, 0.25),
                 image_size: None | Size | Sequence[Size] = None, activation_checkpointing: bool = False,
                 lora: dict[str, Any] | None = None, data_preprocessor: dict[str, Any] | None = None,
                 **siblings: Any) -> None:
        leave_aside(type(self), siblings, DiffusionModel)
        super().__init__(backbone, sample_sigmas, image_size, activation_checkpointing, lora, data_preprocessor)
        self.check_trainable()
        self.sigma, self.drop_rate = build_sampler(sigma), drop_rate
        self.loss = MODELS.build(dict(loss))

    @property
    def phases(self) -> tuple[Phase, ...]:
        return (Phase('student', self.student_loss),)

    def start(self, batch: dict[str, Any]) -> Iteration:
        """Condition, some rows of it replaced by the null condition, and draws; the size is the pictures'."""
        condition = self.backbone.condition(batch)
        batch = dict(batch, latents=self.backbone.real_latents(batch, self.math_dtype))
        shape = tuple(batch['latents'].shape)
        draws = FlowMatchingDraws.sample(**self.draw_key(), shape=shape, sigma=self.sigma, drop_rate=self.drop_rate,
                                         shift=partial(self.backbone.shift_sigmas, latent_size=shape[2:]))
        draws = draws.to(self.device, self.math_dtype)
        return Iteration(batch, condition.where(draws.drop, self.null_condition(len(condition))), draws)

    def student_loss(self, iteration: Iteration, step: int = 0) -> Tensor:
        """The loss of the velocity on noised pictures."""
        x0, draws = iteration.batch['latents'], iteration.draws
        velocity = self.velocity('student', add_noise(x0, draws.noise, draws.sigma), draws.sigma, iteration.condition)
        per_sample = self.loss(velocity, x0, draws.noise)
        iteration.per_sample['student'] = [per_sample.detach()]
        return per_sample.mean()
