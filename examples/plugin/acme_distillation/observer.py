"""A hook: it is asked after each iteration, on every rank (cdm_plugin/hookspecs.py)."""
from collections.abc import Mapping

from torch import Tensor

from cdm_plugin.plugins import hookimpl


@hookimpl
def cdm_after_iteration(logs: Mapping[str, Tensor | float]) -> dict[str, Tensor] | None:
    """How far the student's loss lies above the fake score's; of its arguments a hook takes those that it needs."""
    if 'loss_student' not in logs:  # no step of the student in this iteration
        return None
    return dict(acme_gap=logs['loss_student'] - logs['loss_fake'])
