"""A run that is killed again and again, and goes on each time, ends in the bits of one that was left alone."""
import contextlib
import random
import time

import pytest
import torch
from recipes import CDM
from scale_support import Workers, run_command
from tests_support import same_bits

from cdm_plugin.compat.checkpoints import damage

ITERATIONS, KILLS = 16, 5
NETWORKS = dict(full=[], lora=['model.lora.rank=2', 'model.anchor_aware_fake=False'])


def command(work_dir, network, processes, *extra):
    """Arguments of `cdm` for a training that saves after every iteration, and keeps one checkpoint."""
    shared = [] if processes == 1 else ['--launcher', 'pytorch']
    return ['train', CDM, '--work-dir', str(work_dir), *shared, *extra, '--cfg-options', *NETWORKS[network],
            f'train_cfg.max_iters={ITERATIONS}', 'model.time_grid.max_steps=4', 'train_dataloader.batch_size=2',
            'train_dataloader.num_workers=0',
            'default_hooks.checkpoint.interval=1', 'default_hooks.checkpoint.max_keep_ckpts=1', 'log_level=WARNING',
            'custom_hooks.1.interval=1000', 'custom_hooks.1.teacher_steps=1', 'custom_hooks.1.steps=[]',
            *([] if processes == 1 else ['model_wrapper_cfg.type=DistillationDataParallel'])]


def checkpoints(work_dir, since=0.0):
    """Names of all checkpoints, the one that is being written included, or of those that were touched since a time."""
    found = {}
    with contextlib.suppress(FileNotFoundError):  # renamed meanwhile, or no folder yet
        found.update({path.name: path.stat().st_mtime for path in work_dir.iterdir() if '.pth' in path.name})
    return [name for name, time in found.items() if time >= since]


def wait_for_a_save(work_dir, workers, number, seconds=float('inf')):
    """Returns while the run writes its n-th checkpoint from now on, or after so many seconds."""
    seen, start = set(), time.time()
    while len(seen) < number and time.time() < start + seconds and workers.processes[0].exitcode is None:
        seen.update(name.partition('.')[0] for name in checkpoints(work_dir, start))
        time.sleep(0.001)


@pytest.mark.slow
@pytest.mark.parametrize('processes', [1, 2])
@pytest.mark.parametrize('network', list(NETWORKS))
def test_five_kills_cost_nothing(network, processes, tmp_path):
    whole, killed = tmp_path / 'whole', tmp_path / 'killed'
    with Workers(run_command, command(whole, network, processes), world_size=processes) as workers:
        assert not any(workers.wait(120)), workers.text()
    choose = random.Random(f'{network} {processes}')
    inside = 0
    for kill in range(KILLS):
        resume = ['--resume'] if (killed / 'last_checkpoint').exists() else []
        start = time.time()
        with Workers(run_command, command(killed, network, processes, *resume), world_size=processes) as workers:
            victims = choose.choice([[0], [processes - 1], range(processes)])
            if kill == KILLS // 2:
                wait_for_a_save(killed, workers, 2, choose.uniform(0, 4))  # at any moment of a start
                victims = range(processes)
            else:
                wait_for_a_save(killed, workers, choose.choice([1, 2]))
                time.sleep(choose.choice([0, 0, 0, choose.uniform(0, 0.05)]))
            for rank in victims:
                workers.kill(rank)
            left = checkpoints(killed, start)
            inside += len(left) > 1 or any(name.endswith('.part') for name in left)
            statuses = workers.wait(30)  # the others end by themselves
            if len(victims) < processes:
                assert max(statuses) > 0 and 'training stopped: ' in workers.text(), workers.text()
        assert not (killed / f'iter_{ITERATIONS}.pth').exists(), 'the run ended before it was killed'
        for name in checkpoints(killed):
            assert name.endswith('.part') or damage(str(killed / name)) is None
    with Workers(run_command, command(killed, network, processes, '--resume'), world_size=processes) as workers:
        assert not any(workers.wait(120)), workers.text()
    print(f'{KILLS} kills, {inside} of them inside a save')
    assert inside >= 1
    assert checkpoints(killed) == [f'iter_{ITERATIONS}.pth'] and not (killed / '.cdm_lock').exists()
    a, b = (torch.load(folder / f'iter_{ITERATIONS}.pth', weights_only=True) for folder in (whole, killed))
    for part in ('state_dict', 'student_ema', 'optimizer', 'param_schedulers'):
        same_bits(a[part], b[part], part)
    trained = 'lora_B' if network == 'lora' else 'anchor_embedding.embedding.linear_2'  # of zeros at the start
    assert any(value.abs().sum() > 0 for key, value in b['state_dict'].items() if trained in key)
