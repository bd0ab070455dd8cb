"""The score losses of the paper. They are one class: each states a direction of x0, and the reference of its normaliser
(arXiv 2605.06376, section 3; Decoupled DMD, 2511.22677, eq. 6; DMD2, 2405.14867, eq. 2)."""
from dataclasses import replace
from typing import Any, Literal

import torch
from mmengine.registry import MODELS
from torch import Tensor

from cdm_plugin.arguments import NotNegative, Positive
from cdm_plugin.draws import DrawContext
from cdm_plugin.flow import add_noise, diffuse, expand_sigma, extrapolate
from cdm_plugin.losses.base import LossInputs, Sampler, ScoreLoss, ScoreQuery, build_sampler
from cdm_plugin.losses.functional import clamp_share, direction_loss, huber_direction_loss, reference_norm
from cdm_plugin.rollout import Prediction
from cdm_plugin.sigma_samplers import StepSigma

Points = Literal['extrapolated', 'noised', 'on-trajectory']
Guidance = Literal['plain', 'backbone']
Space = Literal['x0', 'velocity']


class DirectionLoss(ScoreLoss):
    """Moves the student's x0 along a direction delta that the scores give at z, the x0 noised anew: the loss is the
    squared distance to x0 + w delta, w = 1 / max(mean|reference - x0|, min_norm) of each sample.

    Args:
        alpha (float): Strength of guidance, where the direction has it; guidance scale s corresponds to alpha = s - 1.
            Default 7, the published recipe.
        sigma (dict): Sigma sampler of the re-noising. Default UniformSigma.
        min_norm (float): Lower clamp of the normaliser, above 0. Default 0.1.
        weight (float): Factor in the student loss. Default 1.
        guidance (str): What guidance adds to D_teacher(z, c): 'plain', the published alpha (D_teacher(z, c) -
            D_teacher(z, null)), or 'backbone', the difference that the guidance of the teacher's own pipeline makes at
            scale 1 + alpha (LongCat-Image renormalises it). Default 'plain'.
        space (str): Where the squared distance is measured. Since x0 = x_n - sigma_n v, the student's velocity is off
            its target by 1 / sigma_n of what its x0 is: in 'x0' the gradient with respect to v carries a factor
            sigma_n, and low anchors learn slowly; in 'velocity' the loss of each sample is divided by sigma_n^2 (of the
            point where the loss trains), and all anchors learn alike. A level of 0.02 then weighs 2,500 times as much
            as one of 1. Default 'x0', as published.
    """

    # The distance in x0 is sigma_n to this power times that in velocity.
    _order = 2

    def __init__(self, alpha: float = 7.0, sigma: Sampler = dict(type='UniformSigma'), min_norm: Positive = 0.1,
                 weight: NotNegative = 1.0, guidance: Guidance = 'plain', space: Space = 'x0') -> None:
        super().__init__(weight)
        self.alpha, self.sigma, self.min_norm, self.guidance = alpha, build_sampler(sigma), min_norm, guidance
        self.space = space

    @property
    def asks(self) -> tuple[str, ...]:
        """Which estimates of x0 at z the direction needs: 'teacher', 'null' (the teacher's without prompt), 'fake'."""
        raise NotImplementedError

    def direction(self, inputs: LossInputs) -> tuple[Tensor, Tensor]:
        """delta and the reference of the normaliser, each (B, ...)."""
        raise NotImplementedError

    def guided_difference(self, inputs: LossInputs) -> Tensor:
        """What guidance adds to D_teacher(z, c), (B, ...)."""
        cond, null = inputs.answers['teacher'], inputs.answers['null']
        if self.guidance == 'plain':
            return self.alpha * (cond.x0 - null.x0)
        backbone = inputs.answering['teacher']
        guided = backbone.guide(cond.velocity, null.velocity, backbone.guidance_at(1 + self.alpha, cond.sigma))
        return expand_sigma(cond.sigma, cond.x0) * (cond.velocity - guided)

    def draw(self, context: DrawContext) -> dict[str, Tensor]:
        return dict(sigma=context.sigma(self.sigma), noise=context.noise())

    def noised(self, inputs: LossInputs) -> Tensor:
        """z, at the level that was drawn, (B, ...)."""
        return add_noise(inputs.prediction.x0, inputs.draws['noise'], inputs.draws['sigma'])

    def queries(self, inputs: LossInputs) -> dict[str, ScoreQuery]:
        sigma, z = inputs.draws['sigma'], self.noised(inputs)
        questions = dict(teacher=ScoreQuery('teacher', z, sigma), null=ScoreQuery('teacher', z, sigma, null=True),
                         fake=ScoreQuery('fake', z, sigma))
        return {name: questions[name] for name in self.asks}

    def distance(self, x0: Tensor, delta: Tensor, reference: Tensor) -> Tensor:
        """Of the student's x0 to where the direction leads, (B,)."""
        return direction_loss(x0, delta, reference, self.min_norm)

    def forward(self, inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
        x0, (delta, reference) = inputs.prediction.x0, self.direction(inputs)
        loss = self.distance(x0, delta, reference)
        if self.space == 'velocity':
            loss = loss / inputs.prediction.sigma**self._order
        return loss, dict(clamp=clamp_share(reference_norm(x0, reference), self.min_norm),
                          left_out=(~delta.isfinite()).sum() + (~reference.isfinite()).sum())


@MODELS.register_module()
class CALoss(DirectionLoss):
    """Classifier-free-guidance augmentation on the on-trajectory prediction (arXiv 2511.22677, second term of
    eq. 8, whose alpha - 1 is alpha here; 2605.06376, section 3).

    Args:
        alpha, min_norm, weight, guidance, space: See `DirectionLoss`.
        sigma (dict): Sigma sampler of the re-noising. Default CappedUniformSigma, the published law; UniformSigma
            gives every anchor the same, consistent guidance (docs/recipes.md).
    """
    asks = ('teacher', 'null')

    def __init__(self, alpha: float = 7.0, sigma: Sampler = dict(type='CappedUniformSigma'), min_norm: Positive = 0.1,
                 weight: NotNegative = 1.0, guidance: Guidance = 'plain', space: Space = 'x0') -> None:
        super().__init__(alpha, sigma, min_norm, weight, guidance, space)

    def direction(self, inputs: LossInputs) -> tuple[Tensor, Tensor]:
        return self.guided_difference(inputs), inputs.answers['teacher'].x0


@MODELS.register_module()
class DMLoss(DirectionLoss):
    """Distribution matching on the on-trajectory prediction (DMD2, arXiv 2405.14867, eq. 2; 2511.22677, first term of
    eq. 8; 2605.06376, section 3).

    Args:
        guided (bool): Whether the real score carries guidance, as in DMD2 (2511.22677, eq. 3 and 4); the normaliser
            then measures against the guided estimate, the real score. Default False: guidance is the CA loss's
            business.
        alpha, sigma, min_norm, weight, guidance, space: See `DirectionLoss`.
    """

    def __init__(self, guided: bool = False, alpha: float = 7.0, sigma: Sampler = dict(type='UniformSigma'),
                 min_norm: Positive = 0.1, weight: NotNegative = 1.0, guidance: Guidance = 'plain',
                 space: Space = 'x0') -> None:
        super().__init__(alpha, sigma, min_norm, weight, guidance, space)
        self.guided = guided

    @property
    def asks(self) -> tuple[str, ...]:
        return ('teacher', 'fake', 'null') if self.guided else ('teacher', 'fake')

    def real(self, inputs: LossInputs) -> Tensor:
        """The real score's estimate of x0, guided if wanted, (B, ...)."""
        conditional = inputs.answers['teacher'].x0
        return conditional + self.guided_difference(inputs) if self.guided else conditional

    def direction(self, inputs: LossInputs) -> tuple[Tensor, Tensor]:
        real = self.real(inputs)
        return real - inputs.answers['fake'].x0, real


@MODELS.register_module()
class TDMLoss(DMLoss):
    """Distribution matching along the trajectory (TDM, arXiv 2503.06674, eq. 6): z is no x0 noised anew, but the end of
    the anchor's own sampling step, x_e = x_n + (sigma_e - sigma_n) v_n, diffused up to a level within the step. So the
    scores compare what the student samples with at that level, and each level belongs to one anchor. Where the student
    noises its x0 anew (`rollout='renoise'`), that is its x0 at the level.

    Args:
        huber (float, optional): c of the pseudo-Huber distance, in x0; None for the square. Default 1e-3, that of the
            authors' recipe. With `space='velocity'` it is c / sigma_n there, and the loss is divided by sigma_n once.
        sigma (dict): Sigma sampler, a StepSigma. Default StepSigma.
        guided, alpha, min_norm, weight, guidance, space: See `DMLoss`. `guided` is True by default.
    """

    def __init__(self, huber: Positive | None = 1e-3, guided: bool = True, alpha: float = 7.0,
                 sigma: Sampler = dict(type='StepSigma'), min_norm: Positive = 0.1, weight: NotNegative = 1.0,
                 guidance: Guidance = 'plain', space: Space = 'x0') -> None:
        super().__init__(guided, alpha, sigma, min_norm, weight, guidance, space)
        self.huber, self._order = huber, 2 if huber is None else 1
        check_step_sigma(self.sigma, 'model.losses.*.sigma')

    def draw(self, context: DrawContext) -> dict[str, Tensor]:
        end = context.end_sigma if context.rollout == 'ode' else torch.zeros_like(context.anchor_sigma)
        return dict(end_sigma=end, **super().draw(context))

    def noised(self, inputs: LossInputs) -> Tensor:
        draws = inputs.draws
        return diffuse_step(inputs.prediction, draws['noise'], draws['end_sigma'], draws['sigma'])

    def distance(self, x0: Tensor, delta: Tensor, reference: Tensor) -> Tensor:
        if self.huber is None:
            return super().distance(x0, delta, reference)
        return huber_direction_loss(x0, delta, reference, self.huber, self.min_norm)


def diffuse_step(anchor: Prediction, noise: Tensor, end_sigma: Tensor, sigma: Tensor) -> Tensor:
    """The end of the sampling step that starts at an anchor, diffused up to `sigma`, (B, ...)."""
    end = extrapolate(anchor.x, anchor.velocity, anchor.sigma, end_sigma)
    return diffuse(end, noise, end_sigma, sigma)


def check_step_sigma(sampler: Any, key: str) -> None:
    """Raises ValueError for a law with levels below the end of a step, which nothing can be diffused to from there."""
    if not isinstance(sampler, StepSigma):
        raise ValueError(f'{key} is {type(sampler).__name__}, but TDM needs levels between the ends of a sampling '
                         "step: dict(type='StepSigma')")


@MODELS.register_module()
class CDMLoss(DMLoss):
    """Distribution matching off the trajectory: at points extrapolated from the anchor along the student's velocity,
    x_c = x_n + (sigma_c - sigma_n) v_n, through which no gradient flows (arXiv 2605.06376, section 3).

    Args:
        points (str): Where the loss trains the student: 'extrapolated' (the method), or what the paper's ablations put
            in its place: 'noised', the student's x0 at the anchor noised anew to sigma_c, or 'on-trajectory', the
            anchor itself. Default 'extrapolated'.
        point_sigma (dict): Sigma sampler of sigma_c. Default U(0, 1) clamped to [0.02, 0.98], as the authors' sampler
            does with every level; AnchorSigma asks an anchor-aware fake score only where it was trained.
        guided (bool): Whether the real score carries guidance, so that on- and off-trajectory predictions aim at the
            same, guided distribution. The normaliser measures against D_teacher(z, c) all the same, as CA's does, so
            that the two weigh alike. Default False, the published recipe.
        alpha, sigma, min_norm, weight, guidance, space: See `DirectionLoss`.
    """

    def __init__(self, point_sigma: Sampler = dict(type='UniformSigma'), guided: bool = False,
                 alpha: float = 7.0, sigma: Sampler = dict(type='UniformSigma'), min_norm: Positive = 0.1,
                 weight: NotNegative = 1.0, points: Points = 'extrapolated', guidance: Guidance = 'plain',
                 space: Space = 'x0') -> None:
        super().__init__(guided, alpha, sigma, min_norm, weight, guidance, space)
        self.points, self.point_sigma = points, build_sampler(point_sigma)

    def draw(self, context: DrawContext) -> dict[str, Tensor]:
        if self.points == 'on-trajectory':
            return super().draw(context)
        point_sigma = context.sigma(self.point_sigma)
        # A capped law of the re-noising is capped at this loss's own point.
        draws = dict(point_sigma=point_sigma, **super().draw(replace(context, anchor_sigma=point_sigma)))
        if self.points == 'noised':
            draws['point_noise'] = context.noise()
        return draws

    def direction(self, inputs: LossInputs) -> tuple[Tensor, Tensor]:
        delta, _ = super().direction(inputs)
        return delta, inputs.answers['teacher'].x0

    def point(self, inputs: LossInputs) -> tuple[Tensor, Tensor] | None:
        if self.points == 'on-trajectory':
            return None
        anchor, to_sigma = inputs.prediction, inputs.draws['point_sigma']
        if self.points == 'noised':
            return add_noise(anchor.x0, inputs.draws['point_noise'], to_sigma), to_sigma
        return extrapolate(anchor.x, anchor.velocity.detach(), anchor.sigma, to_sigma), to_sigma
