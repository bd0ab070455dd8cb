"""Sigma samplers: the laws from which losses draw the noise levels of their questions, one level a sample.

Each is called with a `DrawContext` (generator, levels of the anchors, time grids), and uses what its law depends on.
"""
import inspect
from typing import Any

import torch
from mmengine.registry import TASK_UTILS
from torch import Tensor

from cdm_plugin.arguments import Positive, Share
from cdm_plugin.draws import DrawContext, SigmaShift
from cdm_plugin.flow import shift_sigmas


class SigmaSampler:
    """Base class: clamps every draw to [low, high].

    Args:
        low (float): Smallest noise level. Default 0.02.
        high (float): Largest noise level. Default 0.98.
        shift (str, optional): 'none': the law is that of the levels as they are used. 'scheduler': it is that of the
            levels before the scheduler's shift, those of the anchors included; the shift is applied to what is drawn,
            and then the clamp. Default: the method's `sigma_shift`.
    """

    def __init__(self, low: Share = 0.02, high: Share = 0.98, shift: SigmaShift | None = None) -> None:
        if low >= high:
            raise ValueError(f'{type(self).__name__} needs 0 <= low < high <= 1, but has low={low} and high={high}')
        self.low, self.high, self.shift = low, high, shift

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        law = vars(cls).get('law')
        if law is not None and len(inspect.signature(law).parameters) != 2:
            raise TypeError(f'{cls.__name__}.law{inspect.signature(law)} must take (self, context): what a sampler '
                            'draws from is one cdm_plugin.draws.DrawContext')

    def __call__(self, context: DrawContext) -> Tensor:
        """Draws one level a sample, (B,) float64 in [low, high]."""
        if (self.shift or context.sigma_shift) == 'scheduler':
            sigma = shift_sigmas(self.law(context.before_shift()), context.scheduler_shift)
        else:
            sigma = self.law(context)
        return sigma.clamp(self.low, self.high)

    def law(self, context: DrawContext) -> Tensor:
        """The draw before shift and clamp, (B,) float64."""
        raise NotImplementedError


def _uniform(context: DrawContext) -> Tensor:
    return torch.rand(len(context.anchor_sigma), generator=context.generator, dtype=torch.float64)


@TASK_UTILS.register_module()
class UniformSigma(SigmaSampler):
    """sigma ~ U(0, 1)."""

    def law(self, context: DrawContext) -> Tensor:
        return _uniform(context)


@TASK_UTILS.register_module()
class CappedUniformSigma(SigmaSampler):
    """sigma ~ U(0, sigma_n): never noisier than the sample's own anchor. The published law of CA (arXiv 2511.22677,
    section 4.1)."""

    def law(self, context: DrawContext) -> Tensor:
        return context.anchor_sigma.double() * _uniform(context)


@TASK_UTILS.register_module()
class StepSigma(SigmaSampler):
    """sigma ~ U(end of the step, sigma_n), between the sample's own anchor and the next level of its time grid: no two
    anchors of a grid share a level (TDM, arXiv 2503.06674).

    No draw leaves that interval, not even for the clamp: a level below the step's end cannot be reached from there.
    """

    def __call__(self, context: DrawContext) -> Tensor:
        return super().__call__(context).clamp(context.end_sigma, context.anchor_sigma.double())

    def law(self, context: DrawContext) -> Tensor:
        end = context.end_sigma.double()
        return end + (context.anchor_sigma.double() - end) * _uniform(context)


@TASK_UTILS.register_module()
class LogitNormalSigma(SigmaSampler):
    """sigma = sigmoid(mean + std z), z ~ N(0, 1), as SD3 was trained (Esser et al. 2024, section 3.1).

    Args:
        mean (float): Mean of logit(sigma). Default 0.
        std (float): Standard deviation of logit(sigma), above 0. Default 1.
        low, high, shift: See `SigmaSampler`.
    """

    def __init__(self, mean: float = 0.0, std: Positive = 1.0, low: Share = 0.02, high: Share = 0.98,
                 shift: SigmaShift | None = None) -> None:
        super().__init__(low, high, shift)
        self.mean, self.std = mean, std

    def law(self, context: DrawContext) -> Tensor:
        z = torch.randn(len(context.anchor_sigma), generator=context.generator, dtype=torch.float64)
        return torch.sigmoid(self.mean + self.std * z)


@TASK_UTILS.register_module()
class AnchorSigma(SigmaSampler):
    """The anchors' own law: an independent grid and a uniform index on it, for every sample.

    With it the CDM loss asks an anchor-aware fake score only where the fake score was trained. The clamp is off by
    default (an anchor may sit at pure noise, sigma = 1).
    """

    def __init__(self, low: Share = 0.0, high: Share = 1.0) -> None:
        super().__init__(low, high, shift='none')  # a grid has been shifted

    def law(self, context: DrawContext) -> Tensor:
        generator = context.generator
        grids = [context.draw_grid(generator) for _ in range(len(context.anchor_sigma))]
        return torch.stack([g[torch.randint(len(g), (), generator=generator)] for g in grids]).double()
