from typing import Any

from mmengine.dist import all_gather_object, get_world_size
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from cdm_plugin.data.bad_records import SkipBadRecords, skipping_datasets

# Iterations between two counts, each one message in a run of several processes.
INTERVAL = 50


@HOOKS.register_module()
class BadRecordsHook(Hook):
    """Counts the records that each `SkipBadRecords` of the training dataset has left out, on all ranks and in all their
    workers, each record once: the scalar `bad_records`."""

    def __init__(self) -> None:
        self._datasets: list[SkipBadRecords] = []

    def before_train(self, runner: Any) -> None:
        """Finds the datasets."""
        self._datasets = skipping_datasets(runner.train_dataloader.dataset)
        self._count(runner)

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Counts now and then.

        Raises:
            SampleError: If all ranks together have more than the limit.
        """
        if self.every_n_train_iters(runner, INTERVAL) or self.is_last_train_iter(runner):
            self._count(runner)

    def _count(self, runner: Any) -> None:
        if not self._datasets:
            return
        own = [dataset.bad for dataset in self._datasets]
        everyones = all_gather_object(own) if get_world_size() > 1 else [own]
        found = [sorted(set().union(*theirs)) for theirs in zip(*everyones)]
        for dataset, bad in zip(self._datasets, found):
            dataset.check(bad)
        count = sum(len(bad) + len(dataset.left_out) for dataset, bad in zip(self._datasets, found))
        runner.message_hub.update_scalar('train/bad_records', count)
