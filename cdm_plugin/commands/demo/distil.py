"""Distils the digits teacher, and has the student judged."""
import contextlib
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner
from tqdm import tqdm

from cdm_plugin.commands.demo.judge import NUM_SAMPLES, format_rows, judge
from cdm_plugin.config import load_config
from cdm_plugin.export import export
from cdm_plugin.methods import Distillation
from cdm_plugin.sheets import labelled_grid, save_png

DISTANCE = 'digits/fd'
RECIPE = 'digits/cdm-fixed-grid_sd3-digits_1xb32_4step_400.py'

# What may come next.
OTHER = 'digits/dmd2_sd3-digits_1xb32_4step_800.py'


class ProgressBarHook(Hook):
    """One tqdm line instead of log lines: iterations, and the last validation's distance."""
    priority = 'VERY_LOW'

    def before_train(self, runner: Any) -> None:
        self.bar = tqdm(total=runner.max_iters, initial=runner.iter, desc='distilling', unit='it')

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self.bar.update()

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        if metrics and DISTANCE in metrics:
            self.bar.set_postfix_str(f'distance of {len(runner.val_dataloader.dataset)} digits '
                                     f'{metrics[DISTANCE]:.1f} at {runner.iter}')

    def after_train(self, runner: Any) -> None:
        self.bar.close()


def distil(cfg: Config, verbose: bool = False) -> Distillation:
    """Trains a recipe with MMEngine's runner, its log lines in `<work_dir>/log.txt` unless they are wanted."""
    work_dir = Path(cfg.work_dir)
    work_dir.mkdir(parents=True, exist_ok=True)
    bar = ProgressBarHook()
    with open(work_dir / 'log.txt', 'a') as log, contextlib.redirect_stdout(sys.stdout if verbose else log):
        runner = Runner.from_cfg(cfg)
        runner.register_hook(bar)
        runner.train()
    return runner.model.eval()


def distil_and_judge(work_dir: str, options: dict[str, Any] | None = None, num_samples: int = NUM_SAMPLES,
                     verbose: bool = False) -> Path:
    """Distils, judges, and leaves everything in the work directory.

    Args:
        work_dir (str): Where to.
        options (dict, optional): Dotted config key -> value, over the recipe's.
        num_samples (int): Samples of every row of the table. Default 1000.
        verbose (bool): Whether MMEngine's log goes to the console. Default False.

    Returns:
        Path: results.json.
    """
    if 'OMP_NUM_THREADS' not in os.environ:
        # Networks as small as these gain little by more, and beside other work threads wait for each other.
        torch.set_num_threads(min(4, max(1, (os.cpu_count() or 1) // 4)))
    start = time.perf_counter()
    cfg = load_config(RECIPE, options)
    cfg.work_dir = work_dir
    method = distil(cfg, verbose)
    trained = time.perf_counter() - start
    student = export(method, Path(work_dir, 'student'), config=cfg, prompts=list(range(10)))
    rows, picture = judge(method, num_samples)
    results = Path(work_dir, 'results.json')
    results.write_text(json.dumps(dict(rows=[asdict(r) for r in rows], train_seconds=round(trained, 1)), indent=2))
    grid = save_png(labelled_grid(picture, min_side=80), Path(work_dir, 'samples.png'))
    print(f'\nGuidance scale of the teacher {1 + method.alpha:g}, {num_samples} samples a row, EMA student. The '
          f'distance of fewer\nsamples, as while training, is larger.\n{format_rows(rows)}\n\n'
          f'picture             {grid}\nresults             {results}\nexported student    {student}\n'
          f'{trained:.0f} s of training, {time.perf_counter() - start:.0f} s in all. Next:\n'
          f'  sample it             cdm sample {student} --prompts 0 1 2 3 --out images\n'
          f'  compare it            cdm train {OTHER} --work-dir work_dirs/dmd2\n'
          f'                        cdm compare {work_dir} work_dirs/dmd2 --out compare.html\n'
          f'  begin with your own   cdm init my_student.py; in a config of yours, README: In your own training')
    return results
