"""Whether an optimizer may step: one loss or gradient that is not finite would spoil its weights for good."""
import math
from collections import deque
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class Judgement(NamedTuple):
    """What was found of one update.

    Attributes:
        fine (bool or Tensor): Whether it was taken; a tensor is on the device, and nobody has waited for it.
        terms (dict): By the name of a loss term, whether it was finite on this rank; bool tensors.
    """
    fine: bool | Tensor
    terms: dict[str, Tensor]


class StepGuard:
    """Judges the updates of one role, so that a bad one is left out as a whole: weights, optimizer, merge, average.

    A loss of which a term is not finite becomes NaN, and with it every gradient that it gives. Data-parallel ranks
    average that gradient, sharding engines reduce it, accumulated ones keep it. So the norm of the gradients alone
    decides, and on all ranks alike, without a message of its own. A sound loss is multiplied by 1, which changes no
    bit.

    Attributes:
        taken (bool or Tensor): Whether the last update was taken; a 0-dim tensor of 1 or 0 stays on the device.
        judgements (deque): The updates that nobody has asked for yet.
    """

    def __init__(self) -> None:
        self.taken: bool | Tensor = True
        self.judgements: deque[Judgement] = deque(maxlen=1000)
        self._terms: dict[str, Tensor] = {}

    def checked(self, loss: Tensor, terms: Mapping[str, Tensor]) -> Tensor:
        """The loss as it is, or NaN if it or one of its terms is not finite.

        Args:
            loss (Tensor): What the role minimises, a scalar.
            terms (dict): By name, whether a term of it is finite; 0-dim bool tensors on the loss's device.
        """
        flags = {**terms, 'loss': loss.detach().isfinite()}
        for name, fine in flags.items():  # of all micro-batches of an update
            self._terms[name] = self._terms[name] & fine if name in self._terms else fine
        return loss * torch.where(torch.stack(list(flags.values())).all(), 1.0, math.nan).to(loss.dtype)

    def judged(self, fine: bool | Tensor) -> None:
        """Notes whether an update was taken."""
        self.taken = fine.to(torch.float32) if isinstance(fine, Tensor) else fine
        self.judgements.append(Judgement(fine, self._terms))
        self._terms = {}
