"""Does CDM beat DMD2 on the digits, and why? Every row of `digits_study_plan.py`, each on several seeds.

    python benchmarks/digits_study.py --budget-minutes 60       # goes on where the last call stopped
    python benchmarks/digits_study_report.py                    # docs/results.md from docs/study/*.json

The main rows come first, the long ones last, each seed by seed; the runs stop before the budget ends if the next would
not fit. A finished run is never run again; one that is cut off leaves nothing. Every run trains through MMEngine's
runner on one thread, and its EMA student is judged at 1, 2, 3, 4, 6 and 8 steps, at 4 also at a quarter, half and three
quarters of its length.
"""
import argparse
import contextlib
import copy
import json
import os
import time
from pathlib import Path
from typing import Any

import digits_study_plan as plan
import digits_variants  # noqa: F401  registers them
import numpy as np
import torch
from mmengine.config import Config, ConfigDict
from mmengine.hooks import Hook
from mmengine.registry import MODELS
from mmengine.runner import Runner
from torch import Tensor

from cdm_plugin import assets
from cdm_plugin.commands.demo.judge import NUM_SAMPLES, Judge
from cdm_plugin.commands.doctor.calls import expected_calls
from cdm_plugin.config import check_config, load_config
from cdm_plugin.files import whole_file
from cdm_plugin.inference import sample_prompts, step_sigmas, student_weights
from cdm_plugin.methods import Distillation
from cdm_plugin.metrics import (
    DigitClassifier,
    class_accuracy,
    classifier_features,
    frechet_distance,
    pixels_to_images,
    precision_recall,
)

STUDENT_STEPS = (1, 2, 3, 4, 6, 8)
HELD_OUT = 1000  # the last of the package's digits
MEASURES = ('fd', 'fd_real', 'accuracy', 'precision', 'recall', 'precision_real', 'recall_real')
SECONDS_A_FORWARD = 0.0008  # of one sample, on one thread: a guess for the first run of a row
ORDER = {'main': 0, 'changes': 1, 'forwards': 1, 'grid': 1, 'length': 3}  # of the groups; 2 is every other


class Examiner:
    """Judges samples against the guided teacher's 50-step samples and against held-out digits.

    Args:
        method (Distillation): With the teacher, whose guidance is the method's.
        num_samples (int): Samples of a judgement.
        work_dir (Path): Folder where the teacher's features are kept between runs.
    """

    def __init__(self, method: Distillation, num_samples: int, work_dir: Path) -> None:
        cache = work_dir / f'reference_{num_samples}_{1 + method.alpha:g}.pt'
        self.judge = Judge(method, num_samples, torch.load(cache, weights_only=True) if cache.is_file() else None)
        if not cache.is_file():
            work_dir.mkdir(parents=True, exist_ok=True)
            torch.save(self.judge.reference, cache)
        self.real = held_out_features(self.judge.classifier)

    def examine(self, role: str, steps: int, guided: bool = True) -> dict[str, float | None]:
        """Every measure of a role's samples, None if they are not finite; only a teacher can be guided."""
        judge = self.judge
        images = sample_prompts(judge.method, judge.labels, judge.noise, sigmas=step_sigmas(steps), role=role,
                                guidance_scale=judge.guidance if role == 'teacher' and guided else 1.0)
        if not images.isfinite().all():
            return dict(steps=steps, **dict.fromkeys(MEASURES))
        features = classifier_features(images, judge.classifier)
        precision, recall = precision_recall(features, judge.reference)
        real_precision, real_recall = precision_recall(features, self.real)
        fd, fd_real = (round(frechet_distance(features, other), 4) for other in (judge.reference, self.real))
        accuracy = class_accuracy(images, judge.labels, judge.classifier)
        values = (fd, fd_real, accuracy, precision, recall, real_precision, real_recall)
        return dict(steps=steps, **dict(zip(MEASURES, values)))


def held_out_features(classifier: DigitClassifier) -> Tensor:
    """Features of real digits that neither the teacher nor the classifier was trained on."""
    with np.load(assets.resolve('asset:digits/digits_16.npz')) as data:
        images = data['images'][-HELD_OUT:]
    return classifier_features(pixels_to_images(images), classifier)


class ExaminerHook(Hook):
    """Judges the EMA student at 4 steps while it trains."""
    priority = 'VERY_LOW'

    def __init__(self, examiner: Examiner, student_steps: list[int]) -> None:
        self.examiner, self.student_steps, self.curve, self.seconds = examiner, student_steps, [], 0.0

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        method = runner.model
        done = (runner.iter + 1) / method.student_every
        if done in self.student_steps:
            start = time.perf_counter()
            method.eval()
            with student_weights(method, ema=True):
                self.curve.append(dict(student_steps=int(done), **self.examiner.examine('student', 4)))
            method.train()
            self.seconds += time.perf_counter() - start


def recipe_of(row: plan.Row) -> Config:
    """The consistent recipe with the row's changes."""
    unshifted = {'model.sigma_shift': 'none'} if row.type == 'DecoupledDMD' else {}  # as the other methods' levels
    cfg = load_config(plan.RECIPE, {'model.type': row.type, **unshifted})
    for key, value in row.options.items():
        *path, last = key.split('.')
        node = cfg._cfg_dict
        for part in path:
            node = node.setdefault(part, ConfigDict())
        node[last] = copy.deepcopy(value)  # whole: no argument of what it replaces is left
    check_config(cfg)
    return cfg


def config_of(row: plan.Row, seed: int, work_dir: Path) -> Config:
    """The config of a run: the consistent recipe with the row's changes, its schedules as long as the run."""
    cfg = recipe_of(row)
    for role in ('student', 'fake'):
        cfg.optim_wrapper[role].optimizer.fused = True  # the same maths in fewer calls
    iterations = student_steps_of(row) * cfg.model.student_every
    cfg.train_cfg.max_iters = iterations
    for schedulers in cfg.param_scheduler.values():
        schedulers[-1].end = iterations
    cfg.randomness.seed = seed
    cfg.work_dir = str(work_dir)
    cfg.experiment_name = f'study-{os.getpid()}-{time.time_ns()}'
    cfg.log_level = 'WARNING'
    cfg.visualizer.vis_backends = []
    cfg.val_dataloader = cfg.val_cfg = cfg.val_evaluator = None  # the examiner judges
    cfg.custom_hooks = [hook for hook in cfg.custom_hooks if hook.type == 'CDMHook']
    cfg.default_hooks.update(checkpoint=None, logger=dict(type='LoggerHook', interval=10**9, log_metric_by_epoch=False))
    return cfg


def forwards_a_step(row: plan.Row) -> float:
    """Expected forward passes of one student step, a sample; forward and backward count as 3."""
    cfg = recipe_of(row)
    method = MODELS.build(cfg.model)
    forwards = expected_calls(method, cfg.train_dataloader.batch_size, 1).equivalents * method.student_every
    return forwards + getattr(method, 'extra_forwards', 0.0)


def student_steps_of(row: plan.Row) -> int:
    """Length of a row, in student steps."""
    if row.forwards_of is None:
        return row.student_steps
    other = plan.ROWS[row.forwards_of]
    return round(other.student_steps * forwards_a_step(other) / forwards_a_step(row))


def compile_networks(method: Distillation, **kwargs: Any) -> None:
    """Compiles whole networks, so small that what lies between their blocks takes as long as the blocks."""
    torch._dynamo.config.recompile_limit = 64  # batches of the rollout, with gradient and without
    # The three share their compiled code, and the anchor's hook alone tells the fake score from the others.
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    for role in ('student', 'fake', 'teacher'):
        getattr(method, role).compile(**kwargs)


def runner_of(row: plan.Row, seed: int, work_dir: Path, compiled: bool = False) -> Runner:
    """What trains one row on one seed."""
    runner = Runner.from_cfg(config_of(row, seed, work_dir))
    if compiled:
        compile_networks(runner.model)
    return runner


def run(row: plan.Row, seed: int, work_dir: Path, num_samples: int, compiled: bool = False) -> dict[str, Any]:
    """Trains and judges one row on one seed."""
    length = student_steps_of(row)
    start = time.perf_counter()
    work_dir.mkdir(parents=True, exist_ok=True)
    with open(work_dir / 'log.txt', 'a') as log, contextlib.redirect_stdout(log):
        runner = runner_of(row, seed, work_dir, compiled)
        examiner = Examiner(runner.model, num_samples, work_dir)
        hook = ExaminerHook(examiner, [round(length * share / 4) for share in (1, 2, 3)])
        runner.register_hook(hook)
        trained = time.perf_counter()
        runner.train()
        trained = time.perf_counter() - trained - hook.seconds
    method = runner.model.eval()
    with student_weights(method, ema=True):
        final = [examiner.examine('student', steps) for steps in STUDENT_STEPS]
    return dict(seed=seed, compiled=compiled, train_seconds=round(trained, 1),
                seconds=round(time.perf_counter() - start, 1), curve=hook.curve, final=final)


def results_of(name: str, num_samples: int, file: Path) -> dict[str, Any]:
    """A row's results so far.

    Raises:
        ValueError: They are of another recipe than the plan's.
    """
    row = plan.ROWS[name]
    head = dict(row=name, type=row.type, options=row.options, student_steps=student_steps_of(row),
                num_samples=num_samples, forwards_a_step=round(forwards_a_step(row), 2))
    head = json.loads(json.dumps(head))
    if not file.is_file():
        return dict(head, runs=[])
    result = json.loads(file.read_text())
    for key, value in head.items():
        if result.get(key) != value:
            raise ValueError(f'{file} holds runs with {key}={result.get(key)}, but they would go on with {value}: give '
                             'the row another name in digits_study_plan.py, or move the file away')
    return result


def write(file: Path, result: dict[str, Any]) -> None:
    """Writes them whole or not at all."""
    with whole_file(file) as part:
        part.write_text(json.dumps(result, separators=(',', ':')) + '\n')


def teacher_rows(out: Path, work_dir: Path, num_samples: int) -> None:
    """The teacher itself, guided and not; with the large alpha of the drift rows against its own reference."""
    file = out / 'teacher.json'
    result = json.loads(file.read_text()) if file.is_file() else dict(num_samples=num_samples)
    for name, (alpha, guided) in plan.TEACHERS.items():
        if name not in result:
            method = MODELS.build(load_config(plan.RECIPE, {'model.alpha': alpha}).model).eval()
            examiner = Examiner(method, num_samples, work_dir)
            result[name] = [examiner.examine('teacher', steps, guided) for steps in plan.TEACHER_STEPS]
            write(file, result)


def jobs(names: list[str], max_seeds: int) -> list[tuple[str, int]]:
    """What is to be run, in order: main rows first, the long ones last, each group seed by seed."""
    wanted = [(ORDER.get(plan.ROWS[name].group, 2), seed, name) for name in names
              for seed in range(min(plan.ROWS[name].seeds, max_seeds))]
    return [(name, seed) for _, seed, name in sorted(wanted, key=lambda job: job[:2])]


def expected_seconds(row: plan.Row, runs: list[dict[str, Any]]) -> float:
    """Of the row's next run."""
    if runs:
        return max(done['seconds'] for done in runs)
    batch = recipe_of(row).train_dataloader.batch_size
    return SECONDS_A_FORWARD * batch * forwards_a_step(row) * student_steps_of(row)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--budget-minutes', type=float, default=float('inf'), help='default: until all is done')
    parser.add_argument('--only', nargs='+', metavar='ROW', choices=list(plan.ROWS), help='default: all rows')
    parser.add_argument('--max-seeds', type=int, default=plan.SEEDS, help='seeds of a row at most')
    parser.add_argument('--compile', action='store_true', help='torch.compile of the networks: the same maths '
                        'to rounding, faster after the minutes that the first run compiles for')
    parser.add_argument('--num-samples', type=int, default=NUM_SAMPLES)
    parser.add_argument('--out', type=Path, default=Path('docs/study'))
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/study'))
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    end = time.monotonic() + 60 * args.budget_minutes
    teacher_rows(args.out, args.work_dir, args.num_samples)
    results: dict[str, dict[str, Any]] = {}
    for name, seed in jobs(args.only or list(plan.ROWS), args.max_seeds):
        row, file = plan.ROWS[name], args.out / f'{name}.json'
        result = results[name] = results.get(name) or results_of(name, args.num_samples, file)
        if seed in [done['seed'] for done in result['runs']]:
            continue
        if time.monotonic() + expected_seconds(row, result['runs']) > end:
            print(f'the budget ends before {name}, seed {seed}')
            return
        done = run(row, seed, args.work_dir, args.num_samples, args.compile)
        result['runs'].append(done)
        write(file, result)
        at = {entry['steps']: entry['fd'] for entry in done['final']}
        print(f'{name}, seed {seed}: {at}, {done["seconds"]:.0f} s', flush=True)


if __name__ == '__main__':
    main()
