from typing import Any, Dict, Optional, Sequence, Union

from mmengine.registry import MODELS
from torch import Tensor

from cdm_plugin.draws import FlowMatchingDraws
from cdm_plugin.flow import add_noise
from cdm_plugin.losses.base import build_sampler
from cdm_plugin.methods.base import DiffusionModel


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
    """

    def __init__(self, backbone: Dict[str, Any], sigma: Any = dict(type='LogitNormalSigma'), drop_rate: float = 0.1,
                 loss: Dict[str, Any] = dict(type='FlowMatchingLoss'),
                 sample_sigmas: Sequence[float] = (1.0, 0.75, 0.5, 0.25),
                 image_size: Union[None, int, Sequence[int]] = None, activation_checkpointing: bool = False,
                 lora: Optional[Dict[str, Any]] = None, data_preprocessor: Optional[Dict[str, Any]] = None) -> None:
        super().__init__(backbone, sample_sigmas, image_size, activation_checkpointing, lora, data_preprocessor)
        if not 0 <= drop_rate <= 1:
            raise ValueError(f'model.drop_rate must lie in [0, 1], but is {drop_rate}')
        self.check_trainable()
        self.sigma, self.drop_rate = build_sampler(sigma), drop_rate
        self.loss = MODELS.build(dict(loss))

    def train_step(self, data: Any, optim_wrapper: Any) -> Dict[str, Tensor]:
        """One step on a batch of images; see `Distillation.train_step`."""
        with self.stepping(optim_wrapper):
            data = self.data_preprocessor(data, True)
            if data.get('image') is None:
                raise ValueError(f"FlowMatching needs images: the batch has {sorted(data)}; name the field with the "
                                 "transform dict(type='PackInputs', image=...)")
            condition = self.backbone.condition(data)
            x0 = self.backbone.codec.encode(data['image'].to(self.math_dtype))
            draws = FlowMatchingDraws.sample(**self.draw_key(), shape=tuple(x0.shape), sigma=self.sigma,
                                             drop_rate=self.drop_rate, shift=self.shift)
            draws = draws.to(self.device, self.math_dtype)
            condition = condition.where(draws.drop, self.null_condition(len(condition)))
            velocity = self.velocity('student', add_noise(x0, draws.noise, draws.sigma), draws.sigma, condition)
            loss = self.loss(velocity, x0, draws.noise).mean()
            wrapper = self._optim_wrapper['student']
            wrapper.update_params(loss)
            self.student_updated = wrapper.should_update()
            return self.finish(dict(loss_student=loss.detach()))
