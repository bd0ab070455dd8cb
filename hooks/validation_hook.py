from typing import Any

from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from cdm_plugin.hooks.method import method_of
from cdm_plugin.metrics.prepare import check_shares, prepare_on_all_ranks


@HOOKS.register_module()
class ValidationHook(Hook):
    """Prepares validation and test: metrics that can run on every rank, and samples that are counted from the first.

    A metric whose package or weights are missing is reported before training starts, and left out. The noise of a
    sample is a function of its number, so every validation judges the same pictures.
    """

    def __init__(self) -> None:
        self._prepared: list[Any] = []

    def before_train(self, runner: Any) -> None:
        """Finds what validation lacks before the first iteration."""
        self._prepare(runner.val_loop, 'val_dataloader')

    def before_val(self, runner: Any) -> None:
        """The same without training."""
        self._prepare(runner.val_loop, 'val_dataloader')

    def before_test(self, runner: Any) -> None:
        """The same of the test."""
        self._prepare(runner.test_loop, 'test_dataloader')

    def _prepare(self, loop: Any, key: str) -> None:
        if loop is None or loop in self._prepared:
            return
        self._prepared.append(loop)
        check_shares(loop.dataloader, key)
        loop.evaluator.metrics, _ = prepare_on_all_ranks(loop.evaluator.metrics)

    def before_val_epoch(self, runner: Any) -> None:
        """Counts from the first sample."""
        self._count(runner, runner.val_loop)

    def before_test_epoch(self, runner: Any) -> None:
        """Counts from the first sample."""
        self._count(runner, runner.test_loop)

    @staticmethod
    def _count(runner: Any, loop: Any) -> None:
        method = method_of(runner)
        method.validated, method.validation_size = 0, len(loop.dataloader.dataset)
