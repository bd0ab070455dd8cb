"""An iteration is a list of phases, and a phase is data: the role that it trains, how often, what it minimises.

Optimizer wrappers, schedules, accumulation, checkpoints and data-parallel or sharding engines follow from the list.
"""
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cdm_plugin.condition import Condition
from cdm_plugin.draws import DrawContext
from cdm_plugin.rollout import Prediction


@dataclass
class Iteration:
    """What the phases of one iteration share.

    Attributes:
        batch (dict): The preprocessed batch.
        condition (Condition): B rows.
        draws (Draws or FlowMatchingDraws): The iteration's random numbers.
        anchor (Prediction, optional): The student's prediction at the anchors, with graph on the student's turn.
        logs (dict): Scalars to log.
        terms (dict): By name, whether a term of the loss that a phase has just computed is finite; 0-dim bool tensors.
        seen (dict): By (role, fake-score step), the features of that step which the role judges, without graph.
        per_sample (dict): By role, the losses of each sample in the steps of its turn, (B,), without graph.
    """
    batch: Mapping[str, Any]
    condition: Condition
    draws: Any
    anchor: Prediction | None = None
    logs: dict[str, Any] = field(default_factory=dict)
    terms: dict[str, Tensor] = field(default_factory=dict)
    seen: dict[tuple[str, int], list[Tensor]] = field(default_factory=dict)
    per_sample: dict[str, list[Tensor]] = field(default_factory=dict)

    def log_sources(self, role: str) -> None:
        """Logs a role's mean loss by the samples' sources, `loss_<role>/<source>`, and how many samples each has,
        `count/<source>`; nothing if the batch does not say its sources."""
        rows: dict[str, list[int]] = {}
        for row, source in enumerate(self.batch.get('source') or ()):
            rows.setdefault(source, []).append(row)
        losses = [loss.unbind() for loss in self.per_sample.pop(role, ())]
        for source, own in rows.items() if losses else ():
            self.logs[f'loss_{role}/{source}'] = torch.stack([loss[row] for loss in losses for row in own]).mean()
            self.logs[f'count/{source}'] = float(len(own))


def _nothing(*args: Any) -> None:
    """Of a phase that draws nothing, or does nothing after its steps."""


@dataclass(frozen=True)
class Phase:
    """One trained role's turn.

    Attributes:
        role (str): The role, an attribute of the method; `optim_wrapper` has its optimizer.
        loss (Callable): (Iteration, number of the step in the turn) -> what it minimises, a scalar with graph.
        every (int): Iterations a turn: it comes in every `every`-th one. Default 1.
        steps (int): Steps of a turn. Default 1.
        draw (Callable, optional): (DrawContext) -> its random numbers by name, in `draws.losses['phase:<role>']`.
        through (tuple): Trained roles that gradients pass through in this phase without reaching their weights.
        stepped (Callable): (whether the optimizer has stepped) -> None, called after each of its steps: True, or a
            tensor of 1 or 0 where only the device knows. Default: nothing.
    """
    role: str
    loss: Callable[[Iteration, int], Tensor]
    every: int = 1
    steps: int = 1
    draw: Callable[[DrawContext], dict[str, Tensor]] | None = None
    through: tuple[str, ...] = ()
    stepped: Callable[[bool | Tensor], None] = _nothing

    def is_due(self, iteration: int) -> bool:
        """Whether an iteration has a turn of this role."""
        return (iteration + 1) % self.every == 0

    def steps_by(self, iterations: int) -> int:
        """Steps (accumulated ones too) in so many iterations."""
        return iterations // self.every * self.steps


@contextlib.contextmanager
def passed_through(networks: Sequence[nn.Module]) -> Iterator[None]:
    """Context in which gradients pass through networks and leave no trace in them, recomputed activations included."""
    parameters = [p for network in networks for p in network.parameters() if p.requires_grad]
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def take_turn(phase: Phase, iteration: Iteration, wrapper: Any) -> bool | Tensor:
    """A role's steps, and their mean loss as the scalar `loss_<role>`.

    Args:
        phase (Phase): The role's phase.
        iteration (Iteration): What the phases share.
        wrapper (OptimWrapper): The role's. If it has a `guard`, that leaves out steps which are not finite.

    Returns:
        bool or Tensor: Whether the last one changed the weights; it does not while gradients accumulate, or if it was
        left out. A tensor of 1 or 0 where only the device knows.
    """
    losses, taken = [], False
    guard = getattr(wrapper, 'guard', None)
    for step in range(phase.steps):
        iteration.terms.clear()
        loss = phase.loss(iteration, step)
        wrapper.update_params(loss if guard is None else guard.checked(loss, iteration.terms))
        taken = wrapper.should_update() and (guard is None or guard.taken)
        if taken is not False:
            phase.stepped(taken)
        losses.append(loss.detach())
    iteration.logs[f'loss_{phase.role}'] = torch.stack(losses).mean()
    iteration.log_sources(phase.role)
    return taken
