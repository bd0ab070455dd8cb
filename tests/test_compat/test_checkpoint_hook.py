"""Which checkpoints a run has at every moment of a save, with MMEngine's own CheckpointHook."""
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.fileio import LocalBackend
from mmengine.hooks import CheckpointHook
from mmengine.logging import MessageHub

from cdm_plugin import compat
from cdm_plugin.compat import checkpoint_hook
from cdm_plugin.compat.checkpoints import save_checkpoint
from cdm_plugin.locks import LOCK, FolderInUse

compat.apply()


class ToyRunner:
    """What CheckpointHook asks of a runner; it saves its history of messages, in files or in folders."""
    log = staticmethod(lambda *args, **kwargs: None)
    logger = SimpleNamespace(info=log, warning=log)
    epoch = 0
    _resume, _load_from = False, None

    def __init__(self, work_dir, folders=False, hub=()):
        self.work_dir, self.folders, self.iter = str(work_dir), folders, 0
        os.makedirs(work_dir, exist_ok=True)
        self.message_hub = MessageHub.get_instance(f'toy{id(self)}')
        self.message_hub.update_info_dict(dict(hub))

    def save_checkpoint(self, out_dir, filename, *args, **kwargs):
        path = Path(out_dir, filename)
        if self.folders:
            path.mkdir(exist_ok=True, parents=True)
            path = path / 'common.pth'
        save_checkpoint(dict(self.message_hub.runtime_info), str(path))


def saving(runner, hook, steps, before_save=lambda: None):
    """Calls the hook after each of the iterations."""
    hook.before_train(runner)
    real = runner.save_checkpoint

    def save(*args, **kwargs):
        before_save()
        real(*args, **kwargs)

    runner.save_checkpoint = save
    for runner.iter in steps:
        hook.after_train_iter(runner, 0)


def there(folder):
    return sorted(path.name for path in Path(folder).glob('*.pth'))


class Killed(BaseException):
    """Nobody catches it, like the end of a process."""


@pytest.mark.parametrize('folders', [False, True])
@pytest.mark.parametrize('keep', [1, 2])
@pytest.mark.parametrize('apart', [False, True])
def test_older_checkpoints_go_when_the_next_one_is_there(apart, keep, folders, tmp_path):
    out = tmp_path / 'out/run' if apart else tmp_path / 'run'
    hook = CheckpointHook(interval=1, by_epoch=False, max_keep_ckpts=keep, save_last=False,
                          out_dir=str(tmp_path / 'out') if apart else None)
    seen = []
    saving(ToyRunner(tmp_path / 'run', folders), hook, range(4), lambda: seen.append(there(out)))
    assert seen == [[f'iter_{i}.pth' for i in range(max(1, n - keep + 1), n + 1)] for n in range(4)]
    assert there(out) == [f'iter_{i}.pth' for i in range(5 - keep, 5)]


@pytest.mark.parametrize('moment', ['save', 'replace', 'remove'])
def test_a_kill_at_any_moment_leaves_a_checkpoint_and_the_next_run_tidies_up(moment, tmp_path, monkeypatch):
    runner = ToyRunner(tmp_path / 'run')
    hook = CheckpointHook(interval=1, by_epoch=False, max_keep_ckpts=1, save_last=False)
    saving(runner, hook, [0])

    def die(*args, **kwargs):
        raise Killed

    owner, name = dict(save=(torch, 'save'), replace=(os, 'replace'), remove=(LocalBackend, 'remove'))[moment]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, die)
        runner.iter = 1
        with pytest.raises(Killed):
            hook.after_train_iter(runner, 0)
    left = dict(save=['iter_1.pth'], replace=['iter_1.pth'], remove=['iter_1.pth', 'iter_2.pth'])[moment]
    assert there(tmp_path / 'run') == left
    assert Path((tmp_path / 'run/last_checkpoint').read_text()).name == left[-1]
    saved = torch.load(tmp_path / 'run' / left[-1], weights_only=False)
    again = ToyRunner(tmp_path / 'run', hub=saved)
    again._resume = True
    saving(again, CheckpointHook(interval=1, by_epoch=False, max_keep_ckpts=1, save_last=False), [2])
    assert there(tmp_path / 'run') == ['iter_3.pth']


@pytest.mark.parametrize('keys', [['a'], ['a', 'b']])
def test_the_best_checkpoint_goes_when_a_better_one_is_there(keys, tmp_path):
    hook = CheckpointHook(interval=1, by_epoch=False, save_best=list(keys), rule='greater', max_keep_ckpts=1)
    runner, seen = ToyRunner(tmp_path / 'run'), []
    saving(runner, hook, [0], lambda: seen.append([n for n in there(tmp_path / 'run') if 'best' in n]))
    for runner.iter, value in enumerate([0.5, 0.4, 0.6], start=1):
        hook.after_val_epoch(runner, dict.fromkeys(keys, value))
    first, third = ([f'best_{key}_iter_{i}.pth' for key in keys] for i in (1, 3))
    assert seen[1] == [] and [n for n in seen[-1] if n in first] == first  # still there while the numbered one is saved
    assert [n for n in there(tmp_path / 'run') if 'best' in n] == third
    assert there(tmp_path / 'run')[-1] == 'iter_3.pth' and len(there(tmp_path / 'run')) == len(keys) + 1
    hook.after_val_epoch(runner, dict.fromkeys(keys, 0.7))  # the same iteration again: the same name
    assert [n for n in there(tmp_path / 'run') if 'best' in n] == third


def hook_of(**kwargs):
    return CheckpointHook(**{'interval': 1, 'by_epoch': False, 'max_keep_ckpts': 1, 'save_last': False, **kwargs})


def test_a_run_has_its_directories_for_itself_until_it_ends(tmp_path):
    (tmp_path / 'run').mkdir()
    for name in ('iter_7.pth.part', 'iter_9.pth.part', 'notes.part'):
        (tmp_path / 'run' / name).write_text('cut short')
    (tmp_path / 'out/run/iter_3.pth.part').mkdir(parents=True)
    (tmp_path / 'out/run/iter_2.pth.old').mkdir()
    hook, runner = hook_of(out_dir=str(tmp_path / 'out')), ToyRunner(tmp_path / 'run')
    hook.before_train(runner)
    assert sorted(os.listdir(tmp_path / 'run')) == [LOCK, 'notes.part']
    assert sorted(os.listdir(tmp_path / 'out/run')) == [LOCK, 'iter_2.pth']
    for work_dir, out_dir in ((tmp_path / 'run', None), (tmp_path / 'else/run', tmp_path / 'out')):
        pid = os.fork()
        if pid == 0:  # another process
            status = 1
            try:
                hook_of(out_dir=out_dir and str(out_dir)).before_train(ToyRunner(work_dir))
            except FolderInUse as error:
                status = f'a training, process {os.getppid()} on' not in str(error)
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    hook.after_train(runner)
    assert not list(tmp_path.rglob(LOCK))


@pytest.mark.parametrize('resumed', ['no', 'here', 'elsewhere'])
def test_a_used_work_directory_is_said_and_its_files_stay(resumed, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(checkpoint_hook, 'print_log', lambda text, logger, level: said.append(text))
    first = ToyRunner(tmp_path / 'run')
    saving(first, hook_of(max_keep_ckpts=-1), range(3))
    # The other run remembers a checkpoint 2 as well, which MMEngine would remove here.
    again = ToyRunner(tmp_path / 'run', hub={} if resumed == 'no' else dict(keep_ckpt_ids=[2, 9]))
    again._resume = resumed != 'no'
    again._load_from = str(tmp_path / 'other/iter_9.pth') if resumed == 'elsewhere' else None
    hook_of().before_train(again)
    if resumed == 'here':
        assert not said and there(tmp_path / 'run') == ['iter_1.pth', 'iter_3.pth']
    else:
        assert there(tmp_path / 'run') == ['iter_1.pth', 'iter_2.pth', 'iter_3.pth']
        text, = said
        assert 'up to iter_3.pth' in text and 'choose another work_dir' in text and '\n' not in text
    hook_of().before_train(ToyRunner(tmp_path / 'fresh'))
    assert len(said) == (resumed != 'here')
