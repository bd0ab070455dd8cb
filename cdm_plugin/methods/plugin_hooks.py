"""Asks the hooks of plug-ins on a method's behalf; a plug-in that fails is named, with its distribution.

Terms of the loss are part of what is trained, so their failure ends the run before it starts. An observer is not, so
the training goes on without it.
"""
from __future__ import annotations

import contextlib
import logging
import traceback
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from mmengine.logging import print_log
from torch import Tensor, nn

from cdm_plugin import plugins
from cdm_plugin.errors import describe
from cdm_plugin.plugins import PluginInfo


@contextlib.contextmanager
def blaming(info: PluginInfo | None, what: str) -> Iterator[None]:
    """An error inside is the plug-in's, if there is one.

    Raises:
        ValueError: In place of the error, naming the plug-in, its distribution and what to do.
    """
    try:
        yield
    except Exception as error:
        if info is None:
            raise
        raise ValueError(f'{info} failed in {what}: {describe(error)}. {info.remedy}') from error


def plugin_losses(method: nn.Module, own: Mapping[str, Any]) -> dict[str, tuple[dict[str, Any], PluginInfo]]:
    """The terms of the student loss that plug-ins give, name -> config and plug-in.

    Args:
        method (Module): The method, half built.
        own (Mapping): The method's own terms by name.

    Raises:
        ValueError: If a plug-in fails, or gives a term of a name that is taken.
    """
    found: dict[str, tuple[dict[str, Any], PluginInfo]] = {}
    for info, hook in plugins.hooks_of('cdm_student_losses'):
        with blaming(info, 'cdm_student_losses'):
            given = hook(method=method) or {}
            if not isinstance(given, Mapping) or not all(isinstance(cfg, Mapping) for cfg in given.values()):
                raise TypeError(f'it must return a dict, name -> config, or None, but returned {given!r}')
        for name, cfg in given.items():
            if name in own or name in found:
                other = f'{type(method).__name__} itself' if name in own else found[name][1]
                raise ValueError(f'{info} and {other} both give a student loss named {name!r}: rename it in the '
                                 f'plug-in. {info.remedy}')
            found[name] = (dict(cfg), info)
    return found


def observe(method: nn.Module, iteration: int, logs: Mapping[str, Any], failed: set[str]) -> dict[str, Any]:
    """The scalars that observers add to an iteration's.

    Args:
        method (Module): The method.
        iteration (int): Its number.
        logs (Mapping): The scalars, which observers may only look at.
        failed (set[str]): Plug-ins that are asked no more; what fails now joins them, with an error in the log.
    """
    added: dict[str, Any] = {}
    for info, hook in plugins.hooks_of('cdm_after_iteration'):
        if info.name in failed:
            continue
        try:
            scalars = hook(method=method, iteration=iteration, logs=MappingProxyType(dict(logs))) or {}
            for name, value in scalars.items():
                if name in logs or name in added:
                    raise ValueError(f'the log has a scalar {name!r} already')
                if not isinstance(value, (int, float)) and not (isinstance(value, Tensor) and value.numel() == 1):
                    raise TypeError(f'{name!r} must be a number, or a tensor of one, but is {value!r}')
        except Exception as error:
            failed.add(info.name)
            print_log(f'{info} failed in cdm_after_iteration, in iteration {iteration}, and is asked no more: '
                      f'{describe(error)}. {info.remedy}\n{"".join(traceback.format_exception(error))}', 'current',
                      logging.ERROR)
            continue
        added.update({k: v.detach() if isinstance(v, Tensor) else v for k, v in scalars.items()})
    return added
