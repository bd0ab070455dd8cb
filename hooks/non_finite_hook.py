import logging
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import all_gather_object, get_world_size
from mmengine.hooks import CheckpointHook, Hook
from mmengine.logging import print_log
from mmengine.registry import HOOKS

from cdm_plugin.arguments import Count
from cdm_plugin.engine.guard import Judgement
from cdm_plugin.errors import NotFinite
from cdm_plugin.hooks.method import method_of
from cdm_plugin.methods import DiffusionModel
from cdm_plugin.roles.weights import first_not_finite, full_weights


@HOOKS.register_module()
class NonFiniteHook(Hook):
    """Names every step that was left out because a loss or a gradient was not finite, ends a run that makes no other,
    and lets no checkpoint have weights that are not finite.

    While the last step of a role was a left-out one, CheckpointHook saves nothing, but at the end of the training: the
    step before may have made weights that are finite and worthless, and older checkpoints should not give way to them.

    Steps are left out where they are made (`cdm_plugin.engine.guard`). Where nothing has waited for the device, this
    hook asks it every `max_skipped` iterations, and so ends the run up to that many iterations later; its weights are
    those of the last step that was taken all the same.

    Args:
        max_skipped (int): Left-out steps of one role in a row that end the run with exit status 3. Default 10.
    """

    def __init__(self, max_skipped: Count = 10) -> None:
        self.max_skipped = max_skipped
        self._waiting: list[tuple[int, str, Judgement]] = []
        self._skipped: Counter = Counter()
        self._in_a_row: Counter = Counter()
        self._sound_at: int | None = None

    def before_train(self, runner: Any) -> None:
        """Says of which roles the steps are not judged, or only by waiting for the device."""
        self._waiting.clear()
        self._in_a_row.clear()
        for role, wrapper in runner.optim_wrapper.items():
            if not hasattr(wrapper, 'guard'):
                print_log(f'optim_wrapper.{role}: a {type(wrapper).__name__} takes steps that are not finite too: '
                          'derive it from RoleOptimWrapper', 'current', level=logging.WARNING)
            elif wrapper.waits and method_of(runner).device.type != 'cpu' and not hasattr(wrapper, 'engine'):
                print_log(f'optim_wrapper.{role}.optimizer: each step waits for the device, to know whether its '
                          "gradients are finite; type='AdamW' with fused=True does not", 'current')

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """CheckpointHook saves again."""
        for hook in runner.hooks:
            if vars(hook).get('after_train_iter') is _save_nothing:
                del hook.after_train_iter, hook.after_train_epoch

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Looks at the steps, and at the weights if this iteration saves them.

        Raises:
            NotFinite: If the steps of a role were left out for too long, or weights are not finite.
        """
        for role in dict.fromkeys(phase.role for phase in method_of(runner).phases):  # in the order of their turns
            guard = getattr(runner.optim_wrapper[role], 'guard', None)
            while guard is not None and guard.judgements:
                self._waiting.append((runner.iter + 1, role, guard.judgements.popleft()))
        known = not any(isinstance(judgement.fine, torch.Tensor) for _, _, judgement in self._waiting)
        saves = self._saves(runner, batch_idx)
        if known or saves or self.every_n_train_iters(runner, self.max_skipped) or self.is_last_train_iter(runner):
            self._read(runner)
        if saves:
            self._check_weights(method_of(runner), f'iteration {runner.iter + 1}', together=True)
            self._sound_at = runner.iter
            if not self.is_last_train_iter(runner):
                self._keep_older(runner)

    def _keep_older(self, runner: Any) -> None:
        stuck = [role for role, count in self._in_a_row.items() if count]
        if stuck:
            print_log(f'iteration {runner.iter + 1}: no checkpoint is written, because the last step of '
                      f'{" and ".join(stuck)} was left out', 'current', level=logging.WARNING)
        for hook in runner.hooks if stuck else ():
            if isinstance(hook, CheckpointHook):
                hook.after_train_iter = hook.after_train_epoch = _save_nothing

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Looks at the weights once more, for whoever saves beside CheckpointHook.

        Raises:
            NotFinite: If they are not finite.
        """
        if self._sound_at != runner.iter:
            method = method_of(runner)
            sharded = any(hasattr(getattr(method, role), 'weight_shards') for role in method.trained_roles)
            # Of whole weights only the first rank is here, of sharded ones every rank.
            self._check_weights(method, f'iteration {runner.iter}', together=sharded)

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint that is not finite.

        Raises:
            ValueError: In that case.
        """
        weights = {**checkpoint.get('state_dict', {}), **checkpoint.get('student_ema', {}).get('weights', {})}
        for role in method_of(runner).trained_roles:  # sharded ones are in their place already
            network = getattr(method_of(runner), role)
            if hasattr(network, 'weight_shards'):
                weights.update({f'{role}.{name}': w for name, w in full_weights(network).items()})
        name = first_not_finite(weights)
        if name is not None:
            raise ValueError(f'the checkpoint has values that are not finite, {name} for example: resume from an '
                             'earlier one')

    def after_train(self, runner: Any) -> None:
        """Says how many steps were left out."""
        for role, count in self._skipped.items():
            print_log(f'{count} steps of {role} were left out in all, because they were not finite', 'current',
                      level=logging.WARNING)

    def _saves(self, runner: Any, batch_idx: int) -> bool:
        """Whether a CheckpointHook, which comes later, saves after this iteration."""
        epoch_ends = self.end_of_epoch(runner.train_dataloader, batch_idx)
        return self.is_last_train_iter(runner) or any(
            epoch_ends if hook.by_epoch else self.every_n_train_iters(runner, hook.interval)
            for hook in runner.hooks if isinstance(hook, CheckpointHook))

    def _read(self, runner: Any) -> None:
        """Counts and names the steps that were left out. All ranks have the same; which loss it was may differ."""
        waiting, self._waiting = self._waiting, []
        pending = [judgement.fine for _, _, judgement in waiting if isinstance(judgement.fine, torch.Tensor)]
        known = iter(torch.stack(pending).tolist() if pending else [])
        for iteration, role, judgement in waiting:
            if next(known) if isinstance(judgement.fine, torch.Tensor) else judgement.fine:
                self._in_a_row[role] = 0
                continue
            self._skipped[role] += 1
            self._in_a_row[role] += 1
            print_log(f'iteration {iteration}: the step of {role} was left out, because {_names(judgement)} '
                      f'({self._in_a_row[role]} in a row, {self._skipped[role]} in all)', 'current',
                      level=logging.WARNING)
            if self._in_a_row[role] >= self.max_skipped:
                last = runner.message_hub.get_info('last_ckpt')
                last = last if last is not None and Path(last).exists() else None
                self._stop(f'iteration {iteration}: the last {self.max_skipped} steps of {role} were not finite '
                           f'(CDMHook.max_skipped): look at the data, and lower optim_wrapper.*.optimizer.lr; '
                           f'{"there is no checkpoint yet" if last is None else f"{last} is from before that"}')

    def _check_weights(self, method: DiffusionModel, when: str, together: bool) -> None:
        name = next((f'{role}.{name}' for role in method.trained_roles
                     if (name := first_not_finite(full_weights(getattr(method, role)))) is not None), None)
        if name is None and method.student_ema is not None:
            name = first_not_finite(method.student_ema.weights)
            name = None if name is None else f'student_ema.{name}'
        if together and get_world_size() > 1:
            name = next((theirs for theirs in all_gather_object(name) if theirs is not None), None)
        if name is not None:
            self._stop(f'{when}: {name} has values that are not finite, and no checkpoint of them is written; the '
                       'earlier ones are as they were')

    @staticmethod
    def _stop(text: str) -> None:
        print_log(text, 'current', level=logging.ERROR)
        raise NotFinite(text)


def _save_nothing(*args: Any, **kwargs: Any) -> None:
    """CheckpointHook's, for one iteration."""


def _names(judgement: Judgement) -> str:
    """What was not finite, on any rank, as words."""
    own = [name for name, fine in judgement.terms.items() if not fine]
    everyones = all_gather_object(own) if get_world_size() > 1 else [own]
    names = list(dict.fromkeys(name for names in everyones for name in names))
    if not names:
        return 'its gradient is not finite'
    ranks = [str(rank) for rank, names in enumerate(everyones) if names]
    where = f' on rank {", ".join(ranks)}' if len(everyones) > 1 else ''
    terms = [name for name in names if name != 'loss'] or ['its loss']
    return f'{", ".join(terms)} {"is" if len(terms) == 1 else "are"} not finite{where}'
