import logging
import signal
import threading
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from mmengine.hooks import CheckpointHook, Hook
from mmengine.logging import print_log
from mmengine.registry import HOOKS

from cdm_plugin.compat.workers import STOP_SIGNALS
from cdm_plugin.errors import Stopped
from cdm_plugin.hooks.hook_group import every_hook
from cdm_plugin.hooks.non_finite_hook import NonFiniteHook
from cdm_plugin.hooks.scalars_hook import ScalarsHook
from cdm_plugin.hooks.student_ema_hook import StudentEMAHook


@HOOKS.register_module()
class SignalHook(Hook):
    """Ends a run that is asked to stop (SIGTERM, SIGUSR1, SIGHUP or the first SIGINT) when it has finished its
    iteration and saved, with exit status 128 + the signal's number; `resume` goes on to the same bits.

    Every rank stops after the same iteration, whichever has got the signal: before each one they compare what they have
    got, in one small message between the CPUs, which waits for no device. Gradients that accumulate are in no
    checkpoint, so the run goes on to the step that takes them. A validation is left where it is, and so is a grid of
    SampleGridHook.

    A second SIGINT ends the process at once. A signal that somebody else handles, or that is ignored (SIGHUP under
    nohup), is left alone.
    """

    def __init__(self) -> None:
        self._got: int = 0
        self._before: dict[int, Any] = {}
        self._ranks: Any = None
        self._first: int = 0

    def before_train(self, runner: Any) -> None:
        """Waits for signals from now on."""
        self._got, self._first = 0, runner.iter
        self._ranks = dist.new_group(backend='gloo') if _world_size() > 1 else None
        if threading.current_thread() is not threading.main_thread():
            print_log('training runs in a thread, which cannot wait for signals: SIGTERM ends it without a checkpoint',
                      'current')
            return
        for number in STOP_SIGNALS:
            before = signal.getsignal(number)
            if before in (signal.SIG_DFL, signal.default_int_handler) or isinstance(
                    getattr(before, '__self__', None), SignalHook):  # of a run that has failed
                self._before[number] = before
                signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        self._got = self._got or number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Stops after the last iteration, if asked to.

        Raises:
            Stopped: In that case.
        """
        self._stop_if_asked(runner)

    def before_val_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Stops in a validation; in training it has the same number of batches on every rank (`ValidationHook`).

        Raises:
            Stopped: In that case.
        """
        if self._before or self._ranks is not None:  # every rank of a training, whatever signals are its own
            self._stop_if_asked(runner)

    def after_train(self, runner: Any) -> None:
        """Gives the signals back."""
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before.clear()
        if self._ranks is not None:
            dist.destroy_process_group(self._ranks)
            self._ranks = None

    def _stop_if_asked(self, runner: Any) -> None:
        number = self._agreed()
        if not number or any(wrapper._inner_count % wrapper._accumulative_counts
                             for wrapper in runner.optim_wrapper.values()):
            return
        saved = self._save(runner)
        if self._ranks is not None:  # a launcher ends the others as soon as one has ended
            dist.barrier(self._ranks)
        print_log(f'{signal.Signals(number).name}: stopped after {runner.iter} iterations; '
                  f'{f"{saved} is there to resume from" if saved else "nothing new to save"}', 'current',
                  level=logging.WARNING)
        self.after_train(runner)
        raise Stopped(number)

    def _agreed(self) -> int:
        """The signal that some rank has got, or 0."""
        if self._ranks is None:
            return self._got
        number = torch.tensor(self._got)
        dist.all_reduce(number, dist.ReduceOp.MAX, self._ranks)
        return int(number)

    def _save(self, runner: Any) -> str | None:
        """Lets CheckpointHook, and what it depends on, do what they do after an iteration that is saved.

        Returns:
            str or None: The checkpoint of the present iteration, if there is one.
        """
        hooks = every_hook(runner)
        for hook in hooks:
            if isinstance(hook, StudentEMAHook):
                hook.after_val_epoch(runner)  # in a validation its weights are in the student's place
        savers = [hook for hook in hooks if isinstance(hook, CheckpointHook)]
        loop = runner.train_loop
        loop._iter -= 1
        for hook in savers:
            hook.interval, hook.save_begin = 1, 0
            if hook.by_epoch:
                hook.by_epoch, hook.filename_tmpl = False, 'iter_{}.pth'
        try:
            if runner.iter >= self._first and not self._saved(runner, savers):
                for hook in hooks:
                    if isinstance(hook, (ScalarsHook, NonFiniteHook, CheckpointHook)):
                        hook.after_train_iter(runner, runner.iter)
            return self._saved(runner, savers)
        finally:
            loop._iter += 1

    @staticmethod
    def _saved(runner: Any, savers: list[CheckpointHook]) -> str | None:
        last = str(runner.message_hub.get_info('last_ckpt', ''))
        names = [hook.filename_tmpl.format(runner.iter + 1) for hook in savers]
        return last if Path(last).name in names else None


def asked_to_stop(runner: Any) -> bool:
    """Whether a rank of a training is asked to stop before its next iteration. Every rank must call it."""
    return any(hook._agreed() for hook in every_hook(runner) if isinstance(hook, SignalHook))


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
