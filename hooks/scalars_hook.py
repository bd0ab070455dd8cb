from typing import Any

import torch
from mmengine.dist import all_gather_object, get_world_size
from mmengine.hooks import CheckpointHook, Hook, LoggerHook, RuntimeInfoHook
from mmengine.registry import HOOKS
from torch import Tensor

from cdm_plugin.hooks.method import method_of


@HOOKS.register_module()
class ScalarsHook(Hook):
    """Leaves an iteration's scalars on the device until they are logged: MMEngine would wait for the device once a
    scalar in every iteration.

    Every hook sees them as `outputs` of `after_train_iter`, tensors that may lie on the device; whoever reads one
    there waits for it. In MMEngine's history, and so in the log, they stand when a LoggerHook or a CheckpointHook
    reads it, in a run of several processes as means over the ranks that have them: those of a source of a mix as means
    over its samples on all ranks, and how many these are, `count/<source>`, as their sum.

    It does in its own time what RuntimeInfoHook does in every iteration, so that one leaves it to this hook while it
    trains. Without a LoggerHook, or with a subclass that has an `after_train_iter` of its own, MMEngine's way stays.
    """

    def __init__(self) -> None:
        self._waiting: list[dict[str, Any]] = []
        self._takes_over = False

    def before_train(self, runner: Any) -> None:
        """Takes over from RuntimeInfoHook."""
        self._waiting.clear()
        stock = RuntimeInfoHook.after_train_iter
        infos = [hook for hook in runner.hooks if isinstance(hook, RuntimeInfoHook)]
        self._takes_over = (any(isinstance(hook, LoggerHook) for hook in runner.hooks)
                            and all(type(hook).after_train_iter is stock for hook in infos))
        if self._takes_over:
            for hook in infos:
                hook.after_train_iter = _leave_aside

    def after_train(self, runner: Any) -> None:
        """Hands back."""
        self._flush(runner)
        for hook in runner.hooks:
            if vars(hook).get('after_train_iter') is _leave_aside:
                del hook.after_train_iter

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Keeps the scalars, and brings them to the host when they are due."""
        if self._takes_over:
            self._waiting += [dict(outputs)] if outputs else []
            if self._are_due(runner, batch_idx):
                self._flush(runner)

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Completes the history of a checkpoint that no CheckpointHook announced."""
        if self._waiting and get_world_size() == 1:  # the other ranks are not here
            self._flush(runner)
            checkpoint['message_hub'] = runner.message_hub.state_dict()

    def _are_due(self, runner: Any, batch_idx: int) -> bool:
        """Whether a LoggerHook or a CheckpointHook, which come later, reads them in this iteration."""
        return (any(self.every_n_inner_iters(batch_idx, hook.interval) for hook in runner.hooks
                    if isinstance(hook, LoggerHook))
                or any(self.every_n_train_iters(runner, hook.interval) for hook in runner.hooks
                       if isinstance(hook, CheckpointHook) and not hook.by_epoch)
                or self.end_of_epoch(runner.train_dataloader, batch_idx) or self.is_last_train_iter(runner))

    def _flush(self, runner: Any) -> None:
        """Brings the waiting scalars to the host in one copy, and their means over the ranks into MMEngine's history,
        in their order."""
        tensors = [value for logs in self._waiting for value in logs.values() if isinstance(value, Tensor)]
        device = method_of(runner).device
        numbers = iter(torch.stack([t.detach().to(device, torch.float32).reshape(()) for t in tensors]).tolist()
                       if tensors else [])
        own = [{key: next(numbers) if isinstance(value, Tensor) else value for key, value in logs.items()}
               for logs in self._waiting]
        self._waiting.clear()
        # As objects: a plug-in may log on one rank only.
        everyones = all_gather_object(own) if get_world_size() > 1 else [own]
        for logs in zip(*everyones):
            for key in dict.fromkeys(key for theirs in logs for key in theirs):
                runner.message_hub.update_scalar(f'train/{key}', _over_ranks(key, [t for t in logs if key in t]))


def _over_ranks(key: str, logs: list[dict[str, float]]) -> float:
    """A scalar of the ranks that have it."""
    name, _, source = key.partition('/')
    if name == 'count':
        return sum(theirs[key] for theirs in logs)
    weights = [theirs.get(f'count/{source}', 1.0) for theirs in logs]
    return sum(weight * theirs[key] for weight, theirs in zip(weights, logs)) / sum(weights)


def _leave_aside(*args: Any, **kwargs: Any) -> None:
    """RuntimeInfoHook's `after_train_iter`, while a ScalarsHook does its work."""
