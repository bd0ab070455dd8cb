"""What every term of the student loss is built from: questions to the teacher and the fake score.

A score loss asks, it does not call: it states its `ScoreQuery` list, the method answers all questions to one role in
one batched network call, and the loss turns its answers into one number a sample. A term that needs gradients through
a network of its own (GAN, reward) does the same with no questions and reads the student's x0.
"""
from dataclasses import dataclass
from typing import Any, Dict, Optional, Tuple

from mmengine.registry import TASK_UTILS
from torch import Tensor, nn

from cdm_plugin.draws import DrawContext
from cdm_plugin.rollout import Prediction


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


class ScoreLoss(nn.Module):
    """Base class of the terms of the student loss.

    Args:
        weight (float): Factor in the student loss. Default 1.
    """

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        if not weight >= 0:
            raise ValueError(f'weight of {type(self).__name__} must be 0 or more, but is {weight}')
        self.weight = weight

    def draw(self, context: DrawContext) -> Dict[str, Tensor]:
        """Every random number that this loss needs in one iteration, by name."""
        return {}

    def point(self, anchor: Prediction, draws: Dict[str, Tensor]) -> Optional[Tuple[Tensor, Tensor]]:
        """Where the student is to be trained: (x (B, ...), sigma (B,)), or None for the anchor itself.

        The prediction at the anchor is shared by all losses that return None.
        """
        return None

    def queries(self, prediction: Prediction, draws: Dict[str, Tensor]) -> Dict[str, ScoreQuery]:
        """The questions, by name; `prediction` is the student's at this loss's point, detached."""
        return {}

    def forward(self, prediction: Prediction, answers: Dict[str, Tensor]) -> Tuple[Tensor, Dict[str, Tensor]]:
        """Turns answers into a loss.

        Args:
            prediction (Prediction): The student's at this loss's point, with gradient.
            answers (dict): Clean-latent estimates by the names of `queries`, (B, ...), float32.

        Returns:
            tuple: Loss of each sample, (B,), and scalars to log (no gradient).
        """
        raise NotImplementedError


def build_sampler(cfg: Any) -> Any:
    """Builds a sigma sampler from its config (or passes a built one through)."""
    if isinstance(cfg, dict) and 'type' not in cfg:
        raise ValueError(f"a sigma sampler needs a type, for example dict(type='UniformSigma', low=0.1), but is {cfg}")
    return TASK_UTILS.build(dict(cfg)) if isinstance(cfg, dict) else cfg


def check_min_norm(min_norm: float) -> float:
    """The lower clamp of a normaliser, above 0."""
    if not min_norm > 0:
        raise ValueError(f'model.losses.*.min_norm must be above 0, but is {min_norm}')
    return min_norm


def clamp_share(norm: Tensor, min_norm: float) -> Tensor:
    """Share of samples whose normaliser is clamped, in [0, 1], scalar: high values mean that w has lost its scale."""
    return (norm < min_norm).to(norm.dtype).mean()
