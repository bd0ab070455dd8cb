"""What a plug-in may add to a training beyond the classes that it registers: the whole list.

A plug-in is a module named by an entry point of the group `cdm_plugin`. Its backbones, losses, time grids, datasets
and metrics need no hook: the module registers them in MMEngine's root registries (`mmengine.registry.MODELS`,
`TASK_UTILS`, `DATASETS`, ...) when it is imported, and a config names them by `type`. The hooks below are for what
no config line asks for. Write `from cdm_plugin.plugins import hookimpl` and decorate a function of the same name; it
may take any subset of the arguments.
"""
from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

PROJECT = 'cdm_plugin'

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def cdm_student_losses(method: Module) -> dict[str, dict] | None:
    """Asked while the method is built. Extra terms of the student loss, name -> config, as in `model.losses`."""


@hookspec
def cdm_after_iteration(method: Module, iteration: int, logs: dict[str, Tensor | float]) -> dict[str, Tensor] | None:
    """Called after each training iteration with the scalars to be logged; returned scalars join the log."""
