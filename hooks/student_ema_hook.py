import contextlib
from typing import Any

from mmengine.hooks import EMAHook, Hook
from mmengine.logging import print_log
from mmengine.registry import HOOKS

from cdm_plugin.arguments import Decay
from cdm_plugin.engine import StudentEMA
from cdm_plugin.engine.refusals import TWO_AVERAGES
from cdm_plugin.hooks.method import method_of


@HOOKS.register_module()
class StudentEMAHook(Hook):
    """Keeps a moving average of the student's weights, `method.student_ema`.

    It replaces the student's weights in validation and test, and is in every checkpoint under `student_ema`. Unlike
    MMEngine's EMAHook it copies the student alone, and averages sharded networks too.

    Args:
        ema_decay (float): Upper limit of the decay, in [0, 1). Default 0.999.
    """

    def __init__(self, ema_decay: Decay = 0.999) -> None:
        self.ema_decay = ema_decay
        self._started = False
        # Whether the average belongs to the student's present weights: not before a checkpoint or training says so.
        self._belongs = False
        self._swapped: contextlib.ExitStack | None = None

    def before_run(self, runner: Any) -> None:
        """Starts the average, in the first run of a runner.

        Raises:
            ValueError: If MMEngine's EMAHook is there too.
        """
        if any(isinstance(hook, EMAHook) for hook in runner.hooks):
            raise ValueError(TWO_AVERAGES)
        self._start(runner)

    def _start(self, runner: Any) -> None:
        if not self._started:
            method = method_of(runner)
            method.student_ema = StudentEMA(getattr(method, method.main_role), self.ema_decay)
            self._started = True

    def before_train(self, runner: Any) -> None:
        """Starts from the weights that a checkpoint without an average, or `load_from`, may have brought."""
        if not (runner._resume and self._belongs):
            method_of(runner).student_ema.reset()
            self._belongs = True

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Takes in a student step."""
        method = method_of(runner)
        if method.student_updated:
            method.student_ema.update(method.updated[method.main_role])

    def before_val_epoch(self, runner: Any) -> None:
        """Puts the average in the student's place."""
        if self._belongs:
            self._swapped = contextlib.ExitStack()
            self._swapped.enter_context(method_of(runner).student_ema.applied())

    def after_val_epoch(self, runner: Any, metrics: Any = None) -> None:
        """Puts the student's own weights back."""
        if self._swapped is not None:
            self._swapped.close()
            self._swapped = None

    def before_test_epoch(self, runner: Any) -> None:
        """As before a validation."""
        self.before_val_epoch(runner)

    def after_test_epoch(self, runner: Any, metrics: Any = None) -> None:
        """As after a validation."""
        self.after_val_epoch(runner)

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Adds the average."""
        checkpoint['student_ema'] = method_of(runner).student_ema.state_dict()

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Takes the average back."""
        self._start(runner)  # FlexibleRunner loads before `before_run`
        if 'student_ema' in checkpoint:
            method_of(runner).student_ema.load_state_dict(checkpoint['student_ema'])
            self._belongs = True
        elif runner._resume:
            print_log('the checkpoint has no student_ema: the EMA starts again from the student', 'current', level=30)
