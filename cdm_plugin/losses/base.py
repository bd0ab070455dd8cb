"""What every term of the student loss is built from: what it sees, and its questions to the teacher and the fake score.

A score loss asks, it does not call: it states its `ScoreQuery` list, the method answers all questions to one role in
one batched network call, and the loss turns its answers into one number a sample. A loss that has a network of its own
to train (a discriminator) states it as a role; one that judges with a frozen network keeps that as a submodule.
"""
from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge
from mmengine.registry import TASK_UTILS
from torch import Tensor, nn

from cdm_plugin.arguments import NotNegative
from cdm_plugin.condition import Condition
from cdm_plugin.draws import DrawContext
from cdm_plugin.rollout import Prediction

if TYPE_CHECKING:  # a loss is handed them, it knows none
    from cdm_plugin.backbones import Backbone
    from cdm_plugin.codecs import Codec

# The number of an iteration.
Start = Annotated[int, Ge(0)]
# What `build_sampler` takes.
Sampler = dict[str, Any] | Callable[..., Tensor]


@dataclass(frozen=True)
class ScoreQuery:
    """One question, D_role(x, sigma) given the condition, for a whole batch.

    Attributes:
        role (str): 'teacher' or 'fake'.
        x (Tensor): Noisy latents, (B, ...), no gradient.
        sigma (Tensor): Their noise levels, (B,).
        null (bool): Ask with the null condition instead of the samples' own.
    """
    role: str
    x: Tensor
    sigma: Tensor
    null: bool = False


@dataclass(frozen=True)
class LossInputs:
    """What a loss sees of one iteration.

    Attributes:
        prediction (Prediction): The student's at this loss's point (in `point`: at the anchor), (B, ...); with
            gradient in `forward`, detached in `point` and `queries`.
        draws (dict): What the loss's `draw` returned.
        batch (dict): The preprocessed batch: `prompt` or `condition`, `image` or `latents` if the dataset has them.
        condition (Condition): B rows.
        backbone (Backbone): The student's; `codec` is its way between latents and images.
        call (Callable): (role, *args) -> what that role's network makes of the arguments; gradients pass through it to
            the arguments if the loss names the role in `through`, or trains it.
        answers (dict): In `forward`, what the teacher or the fake score predicts for each of `queries`, by its name:
            `x0`, `velocity`, `x` and `sigma`, (B, ...) and (B,), float32, no gradient.
        answering (dict): Backbones of the roles that answer.
        features (Callable): In `forward` of a loss that is `on_fake`, (x, sigma) -> what the fake score's `blocks` make
            of it, feature maps (B, D, h, w); gradients pass through to x.
        seen (Sequence): In `role_loss` of a loss that is `on_fake`, the maps of the fake-score step, one a block: of
            the student's samples and then of each of `fake_points`, (k B, D, h, w).
    """
    prediction: Prediction
    draws: Mapping[str, Tensor]
    batch: Mapping[str, Any]
    condition: Condition
    backbone: Backbone
    call: Callable[..., Any]
    answers: Mapping[str, Prediction] = field(default_factory=dict)
    answering: Mapping[str, Backbone] = field(default_factory=dict)
    features: Callable[[Tensor, Tensor], list[Tensor]] | None = None
    seen: Sequence[Tensor] = ()

    @property
    def codec(self) -> Codec:
        """Between latents and images; `codec.decode(x0, gradient=True)` passes gradients."""
        return self.backbone.codec

    def real_latents(self) -> Tensor:
        """The latents of the batch's own pictures, (B, C, h, w).

        Raises:
            ValueError: If the dataset has none.
        """
        return self.backbone.real_latents(self.batch)


class ScoreLoss(nn.Module):
    """Base class of the terms of the student loss.

    A loss that trains a network of its own sets `role` to that network's name, builds it in `build_role` and states in
    `role_loss` what it minimises, every `role_every` iterations. The network then is a trained role like any other: it
    has an entry in `optim_wrapper`, and it is no submodule of the loss, which reaches it through `LossInputs.call`.

    Where that network judges features of the fake score (`on_fake`), both learn in every fake-score step: the fake
    score minimises `fake_weight` times `role_loss` beside its own loss, in the same call of its network.

    Args:
        weight (float): Factor in the student loss. A loss of weight 0 asks nothing. Default 1.
        start (int): First iteration in which the student minimises it. Default 0.
    """
    # Trained roles other than the student that gradients of this loss pass through, without reaching their weights.
    through: tuple[str, ...] = ()
    role: str | None = None
    role_every: int = 1
    # Whether `role` judges what the fake score's `blocks` make of samples; None is the middle one.
    on_fake: bool = False
    blocks: tuple[int, ...] | None = None
    fake_weight: float = 1.0
    # Whether the batch must have pictures.
    real_pictures: bool = False

    def __init__(self, weight: NotNegative = 1.0, start: Start = 0) -> None:
        super().__init__()
        self.weight, self.start = weight, start

    def check(self, batch: Mapping[str, Any], backbone: Backbone) -> None:
        """Looks at a preprocessed batch before training.

        Raises:
            ValueError: If the loss cannot do with such batches.
        """
        if self.real_pictures:
            try:
                backbone.real_latents(batch)
            except ValueError as error:
                raise ValueError(f'{type(self).__name__} (model.losses): {error}') from error

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in ('point', 'queries', 'forward'):
            own = vars(cls).get(name)
            if own is not None and len(inspect.signature(own).parameters) != 2:
                raise TypeError(f'{cls.__name__}.{name}{inspect.signature(own)} must take (self, inputs): what a loss '
                                'sees is one cdm_plugin.losses.LossInputs')

    def draw(self, context: DrawContext) -> dict[str, Tensor]:
        """Every random number that this loss needs in one iteration, by name."""
        return {}

    def point(self, inputs: LossInputs) -> tuple[Tensor, Tensor] | None:
        """Where the student is to be trained: (x (B, ...), sigma (B,)), or None for the anchor itself.

        The prediction at the anchor is shared by all losses that return None.
        """
        return None

    def queries(self, inputs: LossInputs) -> dict[str, ScoreQuery]:
        """The questions, by name."""
        return {}

    def forward(self, inputs: LossInputs) -> tuple[Tensor, dict[str, Tensor]]:
        """Turns the prediction and the answers into a loss.

        Returns:
            tuple: Loss of each sample, (B,), and scalars to log (no gradient). `left_out` among them is the number of
            values that the loss has left out because they are not finite; above 0 the step is not taken.
        """
        raise NotImplementedError

    def build_role(self, backbone: Backbone) -> nn.Module:
        """The network of `role`."""
        raise NotImplementedError

    def role_draw(self, context: DrawContext) -> dict[str, Tensor]:
        """Every random number of one `role_loss`, by name."""
        return {}

    def role_loss(self, inputs: LossInputs) -> Tensor:
        """What `role` minimises, a scalar; `inputs.prediction` is the student's at the anchors, detached."""
        raise NotImplementedError

    def fake_draw(self, context: DrawContext) -> dict[str, Tensor]:
        """Every random number of one fake-score step of a loss that is `on_fake`, by name."""
        return {}

    def fake_points(self, inputs: LossInputs) -> list[Tensor]:
        """What the fake score looks at in its steps beside the student's samples, each noisy latents (B, ...) of the
        samples' levels; `inputs.draws` has the step's `sigma` and `noise` beside what `fake_draw` returned."""
        raise NotImplementedError


def build_sampler(cfg: Sampler) -> Any:
    """Builds a sigma sampler from its config (or passes a built one through)."""
    if isinstance(cfg, dict) and 'type' not in cfg:
        raise ValueError(f"a sigma sampler needs a type, for example dict(type='UniformSigma', low=0.1), but is {cfg}")
    return TASK_UTILS.build(dict(cfg)) if isinstance(cfg, dict) else cfg
