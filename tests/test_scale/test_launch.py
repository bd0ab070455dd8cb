"""Two processes that nobody starts and ends together: what one says reaches the other."""
import os
import sys
import time

import pytest
import torch
from recipes import CDM
from scale_support import Workers, init_gloo, launch

from cdm_plugin.engine import DistillationDataParallel
from cdm_plugin.engine.launch import stop_processes, watched

OPTIONS = ['train_cfg.max_iters=4', 'train_dataloader.batch_size=2', 'train_dataloader.num_workers=0',
           'custom_hooks.1.interval=1000', 'custom_hooks.1.teacher_steps=1', 'custom_hooks.1.steps=[]',
           f'model_wrapper_cfg.type={DistillationDataParallel.__name__}', 'log_level=ERROR']


def command(work_dir, rank, *changes):
    """`cdm train`, with other options on one rank."""
    from cdm_plugin.cli import main
    options = OPTIONS + (list(changes) if int(os.environ['RANK']) == rank else [])
    sys.exit(main(['train', CDM, '--launcher', 'pytorch', '--work-dir', work_dir, '--cfg-options', *options]))


@pytest.mark.parametrize('rank, change, text', [
    (0, 'model.alpha=nan', 'model.alpha must be a finite number'),
    pytest.param(1, 'model.alpha=nan', 'model.alpha must be a finite number', marks=pytest.mark.slow),
    pytest.param(1, 'model.backbone.pretrained=nowhere/at/all', "model.backbone.pretrained='nowhere/at/all'",
                 marks=pytest.mark.slow)], ids=['first', 'second', 'while it builds'])
def test_a_rank_that_fails_before_the_first_message_ends_the_others_with_its_own(rank, change, text, tmp_path):
    with Workers(command, str(tmp_path), rank, change) as workers:
        statuses = workers.wait(60)
        assert statuses[rank] == 2 and statuses[1 - rank] > 0, workers.text()
        assert text in workers.text(rank).splitlines()[-1]
        assert f'training stopped: rank {rank} has failed' in workers.text(1 - rank)
        assert text in workers.text(1 - rank), workers.text()


def hang(how):
    """Rank 1 ends somehow, rank 0 waits for it for ever, in a call that no signal handler of Python interrupts."""
    with watched('pytorch'):
        if os.environ['RANK'] == '1':
            time.sleep(1)
            raise how
        time.sleep(300)


def test_a_rank_that_waits_for_ever_is_ended(tmp_path):
    start = time.monotonic()
    with Workers(hang, MemoryError('no\nmemory')) as workers:
        assert workers.wait(30)[0] == 1, workers.text()
        assert 'training stopped: rank 1 has failed: no memory' in workers.text(0)
    assert time.monotonic() - start < 30


def pass_through():
    with watched('pytorch'):
        init_gloo()
        torch.distributed.barrier()
        return os.environ['MASTER_PORT']


def test_a_run_that_ends_well_says_nothing():
    assert len(set(launch(pass_through, timeout=60))) == 1


def leave(late):
    """How long a rank takes to leave the process group if another one comes later."""
    init_gloo()
    rank = torch.distributed.get_rank()
    torch.distributed.barrier()
    if rank == late:
        time.sleep(2)
    start = time.monotonic()
    stop_processes()
    return time.monotonic() - start


def test_ranks_leave_together():
    """Whoever closes its connections early fails those that still wait for what it has sent."""
    first, late = launch(leave, 1)
    assert first > 1 > late
