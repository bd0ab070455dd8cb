"""The scheduler's part of an architecture: what it makes of noise levels."""
import math
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from cdm_plugin.draws import Rollout
from cdm_plugin.flow import shift_sigmas, stretch_sigmas


class ScheduledLevels:
    """What a backbone knows of its scheduler: how it is loaded, and its shift of noise levels."""
    # What the backbone has besides.
    pretrained: Any
    scheduler: Any
    tokens: Any
    _hub_kwargs: Any

    def _load_scheduler(self, scheduler: dict[str, Any] | None) -> FlowMatchEulerDiscreteScheduler:
        if scheduler is not None or self.pretrained is None:
            made = FlowMatchEulerDiscreteScheduler(**(scheduler or {}))
        else:
            made = FlowMatchEulerDiscreteScheduler.from_pretrained(
                self.pretrained, subfolder='scheduler', **self._hub_kwargs)
        if (scheduler or {}).get('stochastic_sampling'):
            raise ValueError("model.backbone.scheduler.stochastic_sampling: set model.rollout='renoise' instead, which "
                             'training follows too')
        for key in ('invert_sigmas', 'use_karras_sigmas', 'use_exponential_sigmas', 'use_beta_sigmas'):
            if made.config.get(key):
                raise ValueError(f'model.backbone.scheduler: {key}={made.config[key]!r} is not supported, its levels '
                                 'depend on the whole grid; set model.backbone.scheduler=dict(shift=...) instead')
        return made

    def scheduler_for(self, rollout: Rollout) -> FlowMatchEulerDiscreteScheduler:
        """The scheduler with which a pipeline steps from level to level as a student does."""
        return FlowMatchEulerDiscreteScheduler.from_config(
            self.scheduler.config, stochastic_sampling=rollout == 'renoise')

    def shift(self, latent_size: tuple[int, int]) -> float:
        """The scheduler's shift for latents of this height and width: its constant, or exp(mu) with mu linear in the
        number of image tokens (dynamic shifting)."""
        config = self.scheduler.config
        if not config.use_dynamic_shifting:
            return config.shift
        span = config.max_image_seq_len - config.base_image_seq_len
        mu = config.base_shift + (config.max_shift - config.base_shift) * (
            self.tokens(latent_size) - config.base_image_seq_len) / span
        return math.exp(mu) if config.time_shift_type == 'exponential' else mu

    def shift_sigmas(self, sigmas: Tensor, latent_size: tuple[int, int]) -> Tensor:
        """The scheduler's own shift of single noise levels, (N,) -> (N,)."""
        return shift_sigmas(sigmas, self.shift(latent_size))

    def shift_grid(self, sigmas: Tensor, latent_size: tuple[int, int]) -> Tensor:
        """What the scheduler makes of a list of noise levels, descending from 1, (N,) -> (N,): the shift of each and,
        with `shift_terminal`, the whole list stretched so that it ends there.

        The grids of training are such lists, so their levels are those of a pipeline that is given the same list. With
        `shift_terminal` the last of them is always that level, however few they are: of 4 steps with 0.02, the last
        one has next to nothing to do. Levels that are drawn one by one (flow matching) belong to no list.
        """
        shifted, last = self.shift_sigmas(sigmas, latent_size), self.scheduler.config.shift_terminal
        return stretch_sigmas(shifted, last) if last else shifted
