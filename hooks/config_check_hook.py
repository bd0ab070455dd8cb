from typing import Any

from mmengine.hooks import CheckpointHook, Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapperDict
from mmengine.registry import HOOKS

from cdm_plugin.config import check_parts
from cdm_plugin.engine import DistillationDataParallel
from cdm_plugin.engine.refusals import refusals
from cdm_plugin.hooks.method import method_of
from cdm_plugin.methods import DiffusionModel


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
        self._check_accumulation(runner, method)

    @staticmethod
    def _check_accumulation(runner: Any, method: DiffusionModel) -> None:
        """Gradients that wait for their update are in no checkpoint."""
        counts = {role: wrapper._accumulative_counts for role, wrapper in runner.optim_wrapper.items()}
        cycle = max((counts[phase.role] * phase.every for phase in method.phases if counts[phase.role] > 1), default=1)
        for hook in runner.hooks:
            if isinstance(hook, CheckpointHook) and hook.interval > 0 and not hook.by_epoch and hook.interval % cycle:
                print_log(f'default_hooks.checkpoint.interval={hook.interval} is no multiple of {cycle} (iterations a '
                          'turn x accumulative_counts): a run resumed from such a checkpoint loses the gradients '
                          'accumulated until then and differs from an uninterrupted one', 'current', level=30)
