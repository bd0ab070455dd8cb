"""Makes stock MMEngine 0.10.7 work with today's torch, setuptools and numpy, without a fork.

`apply` repairs these things in place, and leaves alone what is not MMEngine's own:

- checkpoints are read without unpickling objects (torch >= 2.6 refuses them anyway),
- a checkpoint is written whole or not at all,
- writing one takes no further memory,
- an older one is removed when the next one is written, not before,
- a copied or moved work_dir resumes from its own files, and from the latest that is not damaged,
- packages are found without `pkg_resources`, which setuptools 82 removed,
- FlexibleRunner takes a config without `env_cfg` and `launcher`, as Runner does,
- a resumed run reads its checkpoint on the CPU, not beside itself on the GPU,
- a `param_scheduler` without a trained role is named,
- workers of a dataloader outlive signals that are meant for the process that trains,
- its strategies build the schedules of several optimizers,
- resume runs no program that a checkpoint carries (`meta['config']`),
- MLflowVisBackend takes pictures of any name, and keeps them by step,
- recipes of this package resolve: `cdm_plugin::sd3/x.py`, and `from cdm_plugin.configs.sd3.x import *` in `read_base`.

`pack_message_hub`, `unpack_message_hub` and `plain` keep what a run saves loadable in this way.
"""
import sys
from collections.abc import Callable
from typing import Any

import mmengine.runner.checkpoint as checkpoint_module
import mmengine.utils.package_utils as package_utils
from mmengine._strategy.base import BaseStrategy
from mmengine.config import Config
from mmengine.fileio import LocalBackend
from mmengine.runner import FlexibleRunner, _flexible_runner, runner

from cdm_plugin.compat.backends import mend_backends
from cdm_plugin.compat.checkpoint_hook import repair_checkpoint_hook
from cdm_plugin.compat.checkpoints import (
    load_without_program,
    put_whole,
    register_local_loader,
    save_checkpoint,
)
from cdm_plugin.compat.good_checkpoint import find_good_checkpoint
from cdm_plugin.compat.packages import get_installed_path, is_installed, package2module
from cdm_plugin.compat.plain_data import pack_message_hub, plain, unpack_message_hub
from cdm_plugin.compat.recipes import add_recipes
from cdm_plugin.compat.runners import mend_runners
from cdm_plugin.compat.workers import shield_workers
from cdm_plugin.files import find_latest_checkpoint

__all__ = ['apply', 'pack_message_hub', 'plain', 'unpack_message_hub']

_stock_flexible_from_cfg = FlexibleRunner.from_cfg.__func__
_stock_build_param_scheduler = BaseStrategy._build_param_scheduler


def apply() -> None:
    """Applies every repair to the MMEngine of this process. Calling it again changes nothing."""
    register_local_loader()
    if LocalBackend.put.__module__.startswith('mmengine.'):
        LocalBackend.put = put_whole
    repair_checkpoint_hook()
    for ours in (find_latest_checkpoint, save_checkpoint):
        _replace(checkpoint_module, ours.__name__, ours)
    for module in (runner, _flexible_runner):  # all ranks are there when these resume
        if module.find_latest_checkpoint is find_latest_checkpoint:
            module.find_latest_checkpoint = find_good_checkpoint
    _replace(checkpoint_module, '_load_checkpoint', load_without_program)
    for of_packages in (is_installed, get_installed_path, package2module):
        _replace(package_utils, of_packages.__name__, of_packages)
    if FlexibleRunner.from_cfg.__func__ is _stock_flexible_from_cfg:
        FlexibleRunner.from_cfg = classmethod(flexible_runner_from_cfg)
    mend_runners()
    shield_workers()
    mend_backends()
    if BaseStrategy._build_param_scheduler is _stock_build_param_scheduler:
        BaseStrategy._build_param_scheduler = build_param_scheduler
    add_recipes()


def flexible_runner_from_cfg(cls: type, cfg: Config) -> FlexibleRunner:
    """Builds a FlexibleRunner from a config; what it leaves out has the defaults of Runner."""
    return _stock_flexible_from_cfg(cls, Config({**dict(env_cfg=dict(dist_cfg=dict(backend='nccl')), launcher='none'),
                                                 **cfg}))


def build_param_scheduler(self: BaseStrategy, scheduler: Any, optim_wrapper: Any, default_args: dict[str, Any]) -> Any:
    """MMEngine's, which takes keys out of the dict that it hands to the next optimizer."""
    return _stock_build_param_scheduler(self, scheduler, optim_wrapper, dict(default_args))


def _replace(module: Any, name: str, ours: Callable) -> None:
    """Puts `ours` in place of MMEngine's own `module.name`, in every module of it that has imported the name."""
    stock = getattr(module, name, None)
    if stock is None or not stock.__module__.startswith('mmengine.'):
        return
    for key, other in list(sys.modules.items()):
        if key.split('.')[0] == 'mmengine' and vars(other).get(name) is stock:
            setattr(other, name, ours)
