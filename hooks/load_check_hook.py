import logging
from typing import Any

from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.optim import OptimWrapperDict
from mmengine.registry import HOOKS, MODELS
from mmengine.runner import BaseLoop

from cdm_plugin.engine.loading import as_checkpoint, check_start, check_whole, named_as
from cdm_plugin.engine.settings import settle
from cdm_plugin.hooks.method import method_of
from cdm_plugin.methods.base import TRAINED_KEYS
from cdm_plugin.methods.overrides import with_defaults
from cdm_plugin.registry import class_of
from cdm_plugin.secrets import without_secrets

FROM_WEIGHTS = 'To start a new run from its weights, set load_from and leave resume out'
# The setting that says whether noise levels are drawn before the scheduler's shift.
LEVELS = 'sigma_shift'
# What MMEngine goes on from.
PARTS = ('meta', 'message_hub', 'optimizer')


@HOOKS.register_module()
class LoadCheckHook(Hook):
    """Compares a checkpoint with what is trained, before it is loaded: MMEngine takes what fits and trains the rest as
    it is.

    To resume, it must have just the weights, the optimizers and the progress of the run; where the config has other
    settings of optimizers and schedules by now, these are taken. To start from (`load_from`), it must have weights of
    every role.
    """

    def before_train(self, runner: Any) -> None:
        """Says that nothing was there to resume: a requeued job may start with `resume=True`, and a mistyped work_dir
        looks the same."""
        if runner._resume and not runner._has_loaded:
            print_log(f'resume=True, but {runner.work_dir} has no checkpoint: the training starts at iteration 0 (is '
                      'that the right work_dir?)', 'current', level=logging.WARNING)

    def after_load_checkpoint(self, runner: Any, checkpoint: Any) -> None:
        """Compares, and brings foreign weights into the form that MMEngine loads.

        Raises:
            ValueError: If the checkpoint does not fit.
        """
        source = runner._load_from or f'in {runner.work_dir}'
        method = method_of(runner)
        if runner._resume and isinstance(checkpoint, dict) and 'config' in checkpoint:
            law = checkpoint.get('meta', {}).get(LEVELS) or 'none'  # the default has been another one
            check_resumed({**({LEVELS: law} if hasattr(method, LEVELS) else {}),
                           **checkpoint['config'].get('model', {})}, runner.cfg.model)
        if runner._resume and isinstance(checkpoint, dict):
            check_levels(checkpoint.get('meta', {}), runner.cfg.model, method)
        sharded = any(hasattr(getattr(method, role), 'weight_shards') for role in method.trained_roles)
        if not sharded:  # DistillationDeepSpeedStrategy compares what it loads itself
            content = as_checkpoint(checkpoint, source)
            own = {name: tuple(weight.shape) for name, weight in method.state_dict().items()}
            content['state_dict'] = weights = named_as(content['state_dict'], own, method.main_role)
            training = isinstance(runner._train_loop, BaseLoop)  # it is still a config in a validation
            if runner._resume and training:
                self._check_resumed(runner, content, source)
                check_whole(weights, own, source, FROM_WEIGHTS)
                self._settle(runner, content)
            else:
                check_start(weights, own, method.trains if training else (method.main_role,), source)
            checkpoint.clear()
            checkpoint.update(content)

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Notes the law of the noise levels, which the config need not say."""
        checkpoint.setdefault('meta', {})[LEVELS] = getattr(method_of(runner), LEVELS, None)

    @staticmethod
    def _check_resumed(runner: Any, checkpoint: dict[str, Any], source: str) -> None:
        roles = [f'optimizer of {role}' for role in runner.optim_wrapper.keys()
                 if role not in checkpoint.get('optimizer', {})]
        missing = [part for part in PARTS if part not in checkpoint] or roles
        if missing:
            raise ValueError(f'the checkpoint {source} cannot be resumed, because it has no {", ".join(missing)} (was '
                             'it saved with save_optimizer=False, or as the best one?): resume from another one. '
                             f'{FROM_WEIGHTS}')

    @staticmethod
    def _settle(runner: Any, checkpoint: dict[str, Any]) -> None:
        meta = checkpoint['meta']
        if isinstance(runner.optim_wrapper, OptimWrapperDict):
            checkpoint['param_schedulers'] = settle(
                dict(runner.optim_wrapper.items()), runner.param_schedulers or {}, checkpoint['optimizer'],
                checkpoint.get('param_schedulers', {}), meta['iter'], meta['epoch'], len(runner.train_dataloader))


def check_resumed(saved: dict[str, Any], model: dict[str, Any]) -> None:
    """Compares the model's config with that of the checkpoint: adapters must be the same, the rest may change."""
    for key in ('rank', 'alpha', 'target_modules'):
        old, new = ((m.get('lora') or {}).get(key) for m in (saved, model))
        if old != new:
            raise ValueError(f'model.lora.{key}={new!r}, but the run that is resumed was trained with {old!r}')
    saved, model, method = without_secrets(saved), without_secrets(model), class_of(model, MODELS)
    for key in TRAINED_KEYS:
        old, new = (with_defaults(key, m.get(key), method) for m in (saved, model))
        if key != 'lora' and old != new:
            print_log(f'model.{key} is {model.get(key)!r} from now on, as the config says (until now '
                      f'{saved.get(key)!r})', 'current', level=logging.WARNING)


def check_levels(meta: dict[str, Any], model: dict[str, Any], method: Any) -> None:
    """Refuses to go on with another law of the noise levels by a default: checkpoints that note none are older than the
    choice, and had none shifted.

    Raises:
        ValueError: If the law is another than the checkpoint's, and the config does not ask for it.
    """
    own, saved = getattr(method, LEVELS, None), meta.get(LEVELS) or 'none'
    if own not in (None, saved) and model.get(LEVELS) is None:
        raise ValueError(f'model.{LEVELS} is {own!r} by default in {type(method).__name__}, but the run that is '
                         f'resumed was trained with {saved!r}: set model.{LEVELS}={saved!r} to go on as it was, or '
                         f'{own!r} to change it')
