"""What a plug-in may add to a training beyond the classes that it registers: the whole list.

A plug-in is a module named by an entry point of the group `cdm_plugin`. Its backbones, losses, time grids, datasets
and metrics need no hook: the module registers them in MMEngine's root registries (`mmengine.registry.MODELS`,
`TASK_UTILS`, `DATASETS`, ...) when it is imported, and a config names them by `type`. The hooks below are for what
no config line asks for. Write `from cdm_plugin.plugins import hookimpl` and decorate a function of the same name; it
may take any subset of the arguments. pluggy's `tryfirst` and `trylast` hold, its wrappers are refused.

A command of `cdm` is an entry point of the group `cdm_plugin.commands` (`cdm_plugin/cli/plugin_commands.py`).
"""
from __future__ import annotations

from collections.abc import Mapping
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
    """Extra terms of the student loss.

    When: once, while the method is built, before its losses are; `method.backbone` is there, its roles are not all.
    That is in a training, and wherever else a config is built: `cdm doctor`, `cdm sample`, `cdm export`.
    Ranks: every one, and each must give the same.
    May change: nothing of the method; it returns name -> config, as in `model.losses`. A config changes or removes
    such a term by its name (`model.losses.NAME=None`). A name that is taken is an error.
    If it fails: the run ends before it starts, with the plug-in's name.
    """


@hookspec
def cdm_after_iteration(method: Module, iteration: int,
                        logs: Mapping[str, Tensor | float]) -> dict[str, Tensor | float] | None:
    """Observes a training.

    When: at the end of each iteration, after every phase, before MMEngine's hooks see the scalars.
    Ranks: every one, with its own scalars. It must not wait for other ranks: the log has the means over them anyway.
    May change: nothing, neither the method nor `logs`, whose tensors may lie on the device (to read one waits for
    it). It returns further scalars for the log, under new names.
    If it fails: the log says so once, with the plug-in's name, and the training goes on without it.
    """
