import logging
from typing import Any

from mmengine.hooks import CheckpointHook, Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapperDict
from mmengine.registry import HOOKS

from cdm_plugin.config import check_parts
from cdm_plugin.engine import DistillationDataParallel
from cdm_plugin.engine.refusals import lost_gradients, refusals
from cdm_plugin.hooks.method import method_of


@HOOKS.register_module()
class ConfigCheckHook(Hook):
    """Finds settings with which a method cannot train as it was meant to."""

    def before_run(self, runner: Any) -> None:
        """Checks the config, where `cdm train` has not, refuses what of MMEngine does not go with methods, and a
        data-parallel wrapper that would wait for the gradients of all roles at once."""
        check_parts(runner.cfg)
        method_of(runner)
        for refusal in refusals(runner.cfg):
            raise ValueError(refusal)
        if is_model_wrapper(runner.model) and not isinstance(runner.model, DistillationDataParallel):
            raise ValueError(f"model_wrapper_cfg.type must be 'DistillationDataParallel', but is "
                             f'{type(runner.model).__name__!r}')

    def before_train(self, runner: Any) -> None:
        """Checks the optimizer wrappers and schedules."""
        method = method_of(runner)
        if not isinstance(runner.optim_wrapper, OptimWrapperDict):
            raise ValueError("optim_wrapper needs constructor='DistillationOptimWrapperConstructor' and one entry a "
                             f'role: {", ".join(method.trained_roles)}')
        for hook in runner.hooks:
            if isinstance(hook, CheckpointHook) and not hook.by_epoch:
                for line in lost_gradients(method, dict(runner.optim_wrapper.items()), hook.interval):
                    print_log(line, 'current', level=logging.WARNING)
