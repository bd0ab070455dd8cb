import warnings
from typing import Any

from mmengine.dist import broadcast_object_list
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.registry import HOOKS
from mmengine.runner import FlexibleRunner

from cdm_plugin.hooks.method import method_of


@HOOKS.register_module()
class IterationHook(Hook):
    """Tells the method the run's seed and the iteration, which its random numbers are a function of.

    The seed is that of the first rank on every rank: with their own, ranks would draw other numbers of network calls.
    """

    def before_run(self, runner: Any) -> None:
        """Hands over the seed."""
        method_of(runner).seed = seed_of(runner)

    def before_train(self, runner: Any) -> None:
        """Hands over the seed again: a resume restores that of an unseeded run."""
        self.before_run(runner)
        if runner._resume and runner.cfg.get('randomness', {}).get('seed') is None:
            print_log('randomness.seed is not set: a resumed run draws its data in another order', 'current', level=30)
        # The student's schedule counts iterations, as MMEngine steps it, so it starts before the student's optimizer.
        warnings.filterwarnings('ignore', message='Detected call of `scheduler.step')
        if isinstance(runner, FlexibleRunner):  # Runner itself does so
            runner.optim_wrapper.initialize_count_status(runner.model, runner.iter, runner.max_iters)

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Tells the iteration."""
        method_of(runner).iteration = runner.iter


def seed_of(runner: Any) -> int:
    """The run's seed, equal on every rank (with `randomness.diff_rank_seed` the ranks' own differ)."""
    seed = [runner.seed]
    broadcast_object_list(seed)
    return seed[0]
