"""What 1,000 iterations leave in a process: nothing."""
import os
import time
from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner
from recipes import CDM
from scale_support import launch
from tests_support import tiny_backbone

from cdm_plugin.config import load_config

ITERATIONS, WARM = 1000, 300


class Usage(Hook):
    """Memory of this process that is no file's, and its open files, every 100 iterations."""

    def __init__(self):
        self.seen = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if self.every_n_train_iters(runner, 100):
            status = dict(line.split(':', 1) for line in Path('/proc/self/status').read_text().splitlines())
            self.seen.append((runner.iter + 1, int(status['RssAnon'].split()[0]) / 1024,
                              len(os.listdir('/proc/self/fd'))))


def children():
    """Processes that this one has started and that still run."""
    return Path(f'/proc/self/task/{os.getpid()}/children').read_text().split()


def long_run(folder):
    """A training with everything that is written while it goes on: logs, curves, grids, checkpoints."""
    usage, start = Usage(), time.monotonic()
    runner = Runner.from_cfg(load_config(CDM, {
        'model.backbone': dict(_delete_=True, **tiny_backbone()), 'model.time_grid.max_steps': 4,
        'model.student_every': 1, 'work_dir': str(folder), 'log_level': 'WARNING',
        'train_cfg': dict(_delete_=True, by_epoch=False, max_iters=ITERATIONS), 'val_cfg': None, 'val_evaluator': None,
        'val_dataloader': None, 'train_dataloader.batch_size': 2, 'train_dataloader.num_workers': 2,
        'train_dataloader.dataset.num_classes': 3, 'default_hooks.logger.interval': 10,
        'default_hooks.checkpoint.interval': 50, 'default_hooks.checkpoint.max_keep_ckpts': 2,
        'custom_hooks': [dict(type='CDMHook'), dict(type='SampleGridHook', interval=50, prompts=[0, 1, 2], num_images=3,
                                                    teacher_steps=4)]}))
    runner.register_hook(usage)
    runner.train()
    seconds = time.monotonic() - start
    return usage.seen, children(), seconds


@pytest.mark.slow
def test_a_thousand_iterations_take_no_more_memory_and_files_than_three_hundred(tmp_path):
    (seen, workers, seconds), = launch(long_run, tmp_path, world_size=1, timeout=900)
    for iteration, memory, opened in seen:
        print(f'{iteration} iterations: {memory:.1f} MB, {opened} files')
    print(f'{seconds:.0f} s')
    warm = [row for row in seen if row[0] >= WARM]
    assert warm[-1][0] == ITERATIONS
    assert max(memory for _, memory, _ in warm) - warm[0][1] < 10
    assert len({opened for _, _, opened in seen}) == 1
    assert len(workers) == 2 and not any(Path(f'/proc/{process}').exists() for process in workers)
    grids = list(tmp_path.glob('*/vis_data/vis_image/samples_*.png'))
    assert len(grids) == ITERATIONS // 50 + 1 and sorted(p.name for p in tmp_path.glob('*.pth')) == [
        'iter_1000.pth', 'iter_950.pth']
    assert torch.load(tmp_path / 'iter_1000.pth', weights_only=True)['meta']['iter'] == ITERATIONS
