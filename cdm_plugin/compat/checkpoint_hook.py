"""MMEngine's CheckpointHook: an earlier checkpoint goes when the next one is on the disk, and a directory has one run.

At every moment a run then has `max_keep_ckpts` checkpoints (or as many as it has written). So a process that is killed
while it saves, or a full disk, costs what came after the last one and no more.
"""
import logging
import os
from collections import deque
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import CheckpointHook
from mmengine.logging import print_log

from cdm_plugin.files import clear_parts
from cdm_plugin.locks import held
from cdm_plugin.ranks import on_first_rank

_stock_before_train = CheckpointHook.before_train
_stock_after_train = CheckpointHook.after_train
_stock_save = CheckpointHook._save_checkpoint_with_step
_stock_save_best = CheckpointHook._save_best_checkpoint


def repair_checkpoint_hook() -> None:
    """Puts the functions of this module in the place of MMEngine's own."""
    for ours in (before_train, after_train, _save_checkpoint_with_step, _save_best_checkpoint):
        if getattr(CheckpointHook, ours.__name__).__module__.startswith('mmengine.'):
            setattr(CheckpointHook, ours.__name__, ours)


def before_train(self: CheckpointHook, runner: Any) -> None:
    """Takes the directories for this run, removes what dead ones have left unfinished, and says if there is an earlier
    run's checkpoint.

    Raises:
        FolderInUse: If another run that lives writes there.
    """
    own = Path(runner.work_dir)
    folder = own if self.out_dir in (None, runner.work_dir) else Path(self.out_dir, own.resolve().name)
    folders = [own] if '://' in str(self.out_dir) else list(dict.fromkeys([own, folder]))
    suffix = Path(self.filename_tmpl).suffix

    def settle() -> None:
        with ExitStack() as stack:
            for path in folders:
                stack.enter_context(held(path, 'a training'))
            for path in folders:
                clear_parts(path, suffix)
            self.folders = stack.pop_all()

    on_first_rank(settle, 'the work directory cannot be used')
    earlier = sorted(folder.glob(self.filename_tmpl.format('*')), key=os.path.getmtime)
    start = runner._resume if isinstance(runner._resume, str) else runner._load_from  # FlexibleRunner takes a path
    goes_on = runner._resume and (start is None or Path(start).resolve().parent == folder.resolve())
    if earlier and not goes_on:
        print_log(f'{folder} has checkpoints of another run, up to {earlier[-1].name}: this one does not go on with '
                  'it, replaces those of the same name, and is what `resume` takes as soon as it has saved one; '
                  'choose another work_dir to keep them apart', 'current', level=logging.WARNING)
        # MMEngine would remove these numbers of the run whose checkpoint was loaded, and they are of the one before.
        runner.message_hub.update_info('keep_ckpt_ids', [])
    _stock_before_train(self, runner)


def after_train(self: CheckpointHook, runner: Any) -> None:
    """Gives the directories back."""
    _stock_after_train(self, runner)
    vars(self).pop('folders', ExitStack()).close()


def _save_checkpoint_with_step(self: CheckpointHook, runner: Any, step: int, meta: dict[str, Any]) -> None:
    """Saves, then removes what is one too many. The new checkpoint names the one that is about to go as well, so that
    MMEngine removes it when it resumes from there, if the process dies in between."""
    keep = self.max_keep_ckpts
    if keep <= 0:
        return _stock_save(self, runner, step, meta)
    self.max_keep_ckpts, self.keep_ckpt_ids = keep + 1, deque(self.keep_ckpt_ids)
    try:
        _stock_save(self, runner, step, meta)
    finally:
        self.max_keep_ckpts = keep
    ids = self.keep_ckpt_ids
    gone = [ids.popleft() for _ in range(len(ids) - keep)]
    runner.message_hub.update_info('keep_ckpt_ids', list(ids))
    _remove(self, (self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(i)) for i in gone))


def _save_best_checkpoint(self: CheckpointHook, runner: Any, metrics: dict[str, float]) -> None:
    """Saves the best checkpoint, and after that removes the one that was the best before."""
    several = hasattr(self, 'best_ckpt_path_dict')  # one a metric
    paths = self.best_ckpt_path_dict if several else vars(self)
    before = {key: paths[key] for key in (list(paths) if several else ['best_ckpt_path']) if paths.get(key)}
    paths.update(dict.fromkeys(before))  # MMEngine removes what it finds here, before it saves
    try:
        _stock_save_best(self, runner, metrics)
    finally:
        paths.update({key: before[key] for key in before if paths[key] is None})
    _remove(self, set(before.values()) - {paths[key] for key in before})


def _remove(hook: CheckpointHook, paths: Iterable[str]) -> None:
    for path in paths if is_main_process() else ():
        if hook.file_backend.isdir(path):  # of shards
            hook.file_backend.rmtree(path)
        elif hook.file_backend.isfile(path):
            hook.file_backend.remove(path)
