"""Runs that are asked to stop: they finish, save, exit with 128 + the signal, and go on to the same bits."""
import copy
import os
import signal
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import signal_support  # noqa: F401  registers SignalAtHook
import torch
from recipes import CDM
from scale_support import Workers, init_gloo, launch, listen, run_command
from tests_support import same_bits

from cdm_plugin.errors import Stopped
from cdm_plugin.hooks import SignalHook, ValidationHook

SAME = ('state_dict', 'student_ema', 'optimizer', 'param_schedulers')
ITERS = 6
SIGNALS = [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT]


@pytest.fixture(autouse=True)
def terminal():
    """No signal is ignored, as nohup would have it, until the test ends."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    listen()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def run(short_run, tmp_path):
    """Builds a runner of six iterations with a validation after the fourth: run(name, *hooks, **options)."""

    def build(name, *hooks, **options):
        return short_run(iters=ITERS, work_dir=tmp_path / name, **copy.deepcopy({
            'custom_hooks': [dict(type='CDMHook'), *hooks], 'train_dataloader.batch_size': 2,
            'train_cfg.val_interval': 4, 'val_dataloader.dataset.length': 4, 'val_dataloader.batch_size': 2,
            'default_hooks.checkpoint.interval': 3, 'default_hooks.checkpoint.max_keep_ckpts': -1, **options}))

    return build


def weights(folder, iteration=ITERS):
    return torch.load(folder / f'iter_{iteration}.pth', weights_only=True)


# Where the signal comes, how often that point has been passed, and after which iteration the run stops. The checkpoint
# of iteration 3 is there anyway.
POINTS = dict(iteration=('after_train_iter', 2, 2), save=('before_save_checkpoint', 1, 3),
              validation=('before_val_iter', 1, 4), start=('before_train', 1, 0))


@pytest.mark.parametrize('point', ['validation', *(
    pytest.param(name, marks=pytest.mark.slow) for name in ('iteration', 'save', 'start'))])
def test_a_stopped_run_goes_on_to_the_same_bits(point, run, tmp_path):
    stage, count, done = POINTS[point]
    run('whole').train()
    before = [signal.getsignal(number) for number in SIGNALS]
    runner = run('run', dict(type='SignalAtHook', point=stage, count=count, number=int(signal.SIGUSR1)))
    with pytest.raises(Stopped) as error:
        runner.train()
    assert error.value.code == 128 + signal.SIGUSR1 == 138
    assert [signal.getsignal(number) for number in SIGNALS] == before
    files = sorted(file.name for file in (tmp_path / 'run').glob('iter_*.pth'))
    assert files == [f'iter_{i}.pth' for i in sorted({done, 3} if done > 3 else {done} - {0})]
    log = next((tmp_path / 'run').glob('*/*.log')).read_text()
    assert f'SIGUSR1: stopped after {done} iterations; ' + (
        f'{tmp_path}/run/iter_{done}.pth is there to resume from' if done else 'nothing new to save') in log
    run('run', resume=True).train()
    a, b = weights(tmp_path / 'whole'), weights(tmp_path / 'run')
    for part in SAME:
        same_bits(a[part], b[part], part)
    history = [state['message_hub']['log_scalars']['train/loss_fake'] for state in (a, b)]
    same_bits(*history)


@pytest.mark.slow
def test_gradients_that_accumulate_are_waited_for(run, tmp_path):
    """Three student steps of two iterations each make an update: iteration 6 is the first without waiting gradients."""
    options = {'optim_wrapper.student.accumulative_counts': 3, 'model.student_every': 2, 'train_cfg.max_iters': 12}
    run('whole', **options).train()
    with pytest.raises(Stopped):
        run('run', dict(type='SignalAtHook', point='after_train_iter', count=2), **options).train()
    assert [file.name for file in sorted((tmp_path / 'run').glob('iter_*.pth'))] == ['iter_3.pth', 'iter_6.pth']
    run('run', resume=True, **options).train()
    a, b = weights(tmp_path / 'whole', 12), weights(tmp_path / 'run', 12)
    for part in SAME:
        same_bits(a[part], b[part], part)


@pytest.mark.slow
def test_a_loop_of_epochs_keeps_what_it_has_learnt(run, tmp_path):
    """MMEngine cannot resume in the middle of an epoch: the resumed run begins it again, with the weights it had."""
    options = {'train_cfg': dict(type='EpochBasedTrainLoop', max_epochs=2, val_interval=10, _delete_=True),
               'train_dataloader.sampler': dict(type='DefaultSampler', shuffle=True, _delete_=True),
               'train_dataloader.dataset.length': 8, 'param_scheduler': None,
               'default_hooks.checkpoint': dict(type='CheckpointHook', by_epoch=True, interval=1, _delete_=True)}
    with pytest.raises(Stopped):
        run('run', dict(type='SignalAtHook', point='after_train_iter', count=6), **options).train()
    assert weights(tmp_path / 'run')['meta']['epoch'] == 1
    run('run', resume=True, **options).train()
    assert torch.load(tmp_path / 'run/epoch_2.pth', weights_only=True)['meta']['epoch'] == 2


@pytest.mark.parametrize('stage, done', [('before_train', 0), ('after_train_iter', 1)])
def test_a_grid_is_left_after_the_row_that_is_drawn(stage, done, run, tmp_path, monkeypatch):
    grid = dict(type='SampleGridHook', interval=1 if done else 100, num_images=2, teacher_steps=2, steps=[1])
    runner = run('run', dict(type='SignalAtHook', point=stage), grid)
    drawn, sample = Counter(), type(runner.model).sample
    monkeypatch.setattr(type(runner.model), 'sample',
                        lambda self, *args, **kwargs: drawn.update([runner.iter]) or sample(self, *args, **kwargs))
    with pytest.raises(Stopped):
        runner.train()
    # Whole, the grids have four rows (student, EMA, teacher and fake score) and three.
    assert drawn == ({0: 1} if done == 0 else {0: 7 + 1})
    assert runner.iter == done and [file.name for file in (tmp_path / 'run').glob('iter_*.pth')] == (
        ['iter_1.pth'] if done else [])


# The hook alone


def bare_runner(saved=''):
    """What SignalHook sees of a runner without hooks that save."""
    loop = SimpleNamespace(_iter=0)

    class Runner(SimpleNamespace):
        iter = property(lambda self: loop._iter)

    return Runner(train_loop=loop, hooks=[], optim_wrapper={}, message_hub=SimpleNamespace(
        get_info=lambda key, default: saved))


def iterate(hook, runner, signals=()):
    """Iterations until the hook stops them, at most ten; the number and the status."""
    hook.before_train(runner)
    for i in range(10):
        if i in dict(signals):
            os.kill(os.getpid(), dict(signals)[i])
        try:
            hook.before_train_iter(runner, i)
        except Stopped as error:
            return i, error.code
        runner.train_loop._iter += 1
    hook.after_train(runner)
    return None


@pytest.mark.parametrize('number, status', zip(SIGNALS, [143, 138, 129, 130]), ids=[s.name for s in SIGNALS])
def test_every_signal_has_its_status(number, status):
    assert iterate(SignalHook(), bare_runner(), {3: number}.items()) == (3, status)
    assert iterate(SignalHook(), bare_runner()) is None


def test_a_signal_that_somebody_handles_or_ignores_is_left_alone():
    seen = []
    before = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGUSR1)}
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    signal.signal(signal.SIGUSR1, lambda *args: seen.append(1))
    try:
        assert iterate(SignalHook(), bare_runner(), {2: signal.SIGHUP, 4: signal.SIGUSR1}.items()) is None
        assert seen == [1] and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def two_interrupts():
    """Waits for ever; the first SIGINT is only noted, the second ends it."""
    SignalHook().before_train(bare_runner())
    os.kill(os.getpid(), signal.SIGINT)
    print('still here', flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)


def test_a_second_interrupt_ends_the_process_at_once():
    with Workers(two_interrupts, world_size=1) as workers:
        assert workers.wait(30) == [-signal.SIGINT] and 'still here' in workers.text()


def one_rank_is_asked(rank):
    own = init_gloo()
    result = iterate(SignalHook(), bare_runner(), {3: signal.SIGTERM}.items() if own == rank else ())
    torch.distributed.barrier()
    return result


def test_all_ranks_stop_after_the_same_iteration():
    assert launch(one_rank_is_asked, 1) == [(3, 143), (3, 143)]


def one_rank_is_asked_in_a_validation(rank):
    """The other rank has handlers of its own, which the hook leaves alone."""
    if init_gloo() != rank:
        for number in SIGNALS:
            signal.signal(number, lambda *args: None)
    hook, runner = SignalHook(), bare_runner()
    hook.before_train(runner)
    for i in range(10):
        if i == 3 and torch.distributed.get_rank() == rank:
            os.kill(os.getpid(), signal.SIGTERM)
        try:
            hook.before_val_iter(runner, i)
        except Stopped as error:
            return i, error.code
    return None


def test_all_ranks_leave_a_validation_together():
    assert launch(one_rank_is_asked_in_a_validation, 1) == [(3, 143), (3, 143)]


def test_a_validation_alone_waits_for_nobody():
    hook = SignalHook()
    hook._got = signal.SIGTERM  # of a training that has ended
    hook.before_val_iter(bare_runner(), 0)


# Processes


def command(work_dir, *extra, iters=ITERS, workers=1, **options):
    changes = {
        'train_cfg.max_iters': iters, 'train_dataloader.batch_size': 2, 'train_dataloader.num_workers': workers,
        'custom_hooks.1.interval': 1000, 'custom_hooks.1.teacher_steps': 1, 'custom_hooks.1.steps': '[]',
        'val_dataloader.dataset.length': 10, 'default_hooks.checkpoint.interval': 4, 'log_level': 'WARNING',
        'default_hooks.checkpoint.max_keep_ckpts': -1, **options}
    return ['train', CDM, '--work-dir', str(work_dir), *extra, '--cfg-options',
            *(f'{key}={value}' for key, value in changes.items())]


def in_own_group(arguments):
    """A command whose process group is not the test's."""
    os.setpgrp()
    run_command(arguments)


def left_in_group(group):
    """Processes of a group that still run."""
    found = []
    for stat in Path('/proc').glob('[0-9]*/stat'):
        try:
            fields = stat.read_text().rpartition(')')[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] not in 'ZX':
            found.append(stat.parent.name)
    return found


def wait_for(path, seconds=120):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f'{path} did not come'
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT], ids=['SIGTERM', 'SIGINT'])
def test_a_signal_to_the_whole_group_leaves_no_worker_and_no_traceback(number, tmp_path):
    """As a terminal, torchrun and systemd send it: dataloader workers get it too."""
    with Workers(in_own_group, command(tmp_path, iters=1000, workers=2), world_size=1) as workers:
        wait_for(tmp_path / 'iter_4.pth')
        group = workers.processes[0].pid
        os.killpg(group, number)
        assert workers.wait(60) == [128 + number], workers.text()
        text = workers.text()
        assert 'Traceback' not in text and 'DataLoader worker' not in text and f'{number.name}: stopped after' in text
        deadline = time.monotonic() + 10
        while left_in_group(group) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not left_in_group(group)
    last = max(tmp_path.glob('iter_*.pth'), key=lambda file: int(file.stem[5:]))
    iters = torch.load(last, weights_only=True)['meta']['iter'] + 2
    for folder, extra in ((tmp_path, ['--resume']), (tmp_path / 'whole', [])):
        with Workers(run_command, command(folder, *extra, iters=iters, workers=2), world_size=1) as workers:
            assert workers.wait(300) == [0], workers.text()
    a, b = weights(tmp_path, iters), weights(tmp_path / 'whole', iters)
    for part in ('state_dict', 'student_ema', 'optimizer'):
        same_bits(a[part], b[part], part)


@pytest.mark.slow
@pytest.mark.parametrize('lora', [False, True], ids=['full', 'lora'])
def test_two_processes_of_which_one_is_asked(lora, tmp_path):
    options = {'model_wrapper_cfg.type': 'DistillationDataParallel', **({'model.lora.rank': 4} if lora else {})}
    launcher = ('--launcher', 'pytorch')
    with Workers(run_command, command(tmp_path, *launcher, iters=1000, **options)) as workers:
        wait_for(tmp_path / 'iter_4.pth')
        os.kill(workers.processes[1].pid, signal.SIGUSR1)
        assert workers.wait(60) == [138, 138], workers.text()
        assert 'Traceback' not in workers.text()
    last = max(int(file.stem[5:]) for file in tmp_path.glob('iter_*.pth'))
    for folder, extra in ((tmp_path, ['--resume']), (tmp_path / 'whole', [])):
        arguments = command(folder, *launcher, *extra, iters=last + 2, **options)
        with Workers(run_command, arguments) as workers:
            assert workers.wait(300) == [0, 0], workers.text()
    a, b = weights(tmp_path, last + 2), weights(tmp_path / 'whole', last + 2)
    for part in ('state_dict', 'student_ema', 'optimizer'):
        same_bits(a[part], b[part], part)


def validate_and_ask(arguments, rank):
    """A command in which one rank gets SIGTERM when a validation begins; the other has handlers of its own."""
    stock = ValidationHook.before_val_epoch

    def ask(self, runner):
        os.kill(os.getpid(), signal.SIGTERM)
        stock(self, runner)

    if int(os.environ['RANK']) == rank:
        ValidationHook.before_val_epoch = ask
    else:
        for number in SIGNALS:
            signal.signal(number, lambda *args: None)
    run_command(arguments)


@pytest.mark.slow
def test_two_processes_of_which_one_is_asked_in_a_validation(tmp_path):
    options = {'model_wrapper_cfg.type': 'DistillationDataParallel', 'train_cfg.val_interval': 3}
    launcher = ('--launcher', 'pytorch')
    with Workers(validate_and_ask, command(tmp_path, *launcher, **options), 1) as workers:
        assert workers.wait(120) == [143, 143], workers.text()
        text = workers.text()
        assert 'Traceback' not in text and 'SIGTERM: stopped after 3 iterations; ' in text
    assert [file.name for file in tmp_path.glob('iter_*.pth')] == ['iter_3.pth']
    for folder, extra in ((tmp_path, ['--resume']), (tmp_path / 'whole', [])):
        with Workers(run_command, command(folder, *launcher, *extra, **options)) as workers:
            assert workers.wait(300) == [0, 0], workers.text()
    a, b = weights(tmp_path), weights(tmp_path / 'whole')
    for part in ('state_dict', 'student_ema', 'optimizer'):
        same_bits(a[part], b[part], part)
