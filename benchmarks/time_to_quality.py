"""Forwards and CPU seconds until a student is as good as published DMD2 ever is, from the study's raw data.

    python benchmarks/time_to_quality.py              # a minute: it counts each method's calls on the digits' network
    python benchmarks/time_to_quality.py --measure    # CPU seconds of a student step first: every method, one process

The bar is the smallest mean over the seeds that a judged point of published DMD2's runs has, FD at 4 steps. A run is
judged after each quarter, so a method is there between two judged points, of its rows of all lengths. Prints a table in
Markdown and draws the curves.
"""
import argparse
import json
import tempfile
import time
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import digits_study
import digits_study_plan as plan
import matplotlib.pyplot as plt
import torch
from mmengine.hooks import Hook
from mmengine.registry import MODELS

from cdm_plugin.commands.doctor.calls import expected_calls

# Method -> rows of the study, of several lengths.
METHODS = {
    'DMD2, published': ('dmd2', 'dmd2-1600'),
    'DMD2, aware': ('dmd2-aware', 'dmd2-aware-equal-forwards', 'dmd2-aware-1600'),
    'DMD2, aware, one rollout': ('dmd2-aware-one-rollout', 'dmd2-aware-one-rollout-equal-forwards'),
    'DecoupledDMD, published (levels never shifted)': ('decoupled-dmd', 'decoupled-dmd-1600'),
    'DecoupledDMD, aware, uncapped': (
        'decoupled-dmd-aware', 'decoupled-dmd-aware-equal-forwards', 'decoupled-dmd-aware-1600'),
    'CDM, published': ('cdm',),
    'CDM, consistent': ('cdm-consistent', 'cdm-consistent-400', 'cdm-consistent-800', 'cdm-consistent-1600'),
    'CDM, consistent, one rollout': ('one-rollout', 'one-rollout-equal-forwards'),
    'CDM, consistent, fixed grid': (
        'fixed-grid-with-cdm', 'fixed-grid-with-cdm-400', 'fixed-grid-with-cdm-equal-forwards',
        'fixed-grid-with-cdm-1113', 'fixed-grid-with-cdm-1600'),
    'CDM, consistent, fixed grid, one rollout (the demo)': (
        'fixed-grid-one-rollout-400', 'fixed-grid-one-rollout-equal-forwards'),
    'the same, the CDM loss alone': ('fixed-grid-cdm-only-one-rollout-equal-forwards',),
    'the same, all three losses in velocity': ('fixed-grid-one-rollout-velocity-400',),
    'DMD2, aware, one rollout, losses in velocity': ('dmd2-aware-one-rollout-velocity-equal-forwards',),
    'TDM, one rollout': ('tdm-one-rollout', 'tdm-equal-forwards')}
BAR = 'DMD2, published'
STUDENT_STEPS, ROUNDS = 21, 2  # of a measurement of CPU seconds, and how often every method is measured
Point = tuple[int, float]


def curve(result: dict[str, Any], steps: int = 4) -> list[Point]:
    """Student steps of every judged point of a row, and the mean FD there; points that a run lacks are left out."""
    runs = [[*((e['student_steps'], e['fd']) for e in run['curve']),
             *((result['student_steps'], e['fd']) for e in run['final'] if e['steps'] == steps)]
            for run in result['runs']]
    return [(points[0][0], mean(fd for _, fd in points)) for points in zip(*runs)
            if None not in [fd for _, fd in points]]


def reached(curves: Iterable[list[Point]], bar: float) -> tuple[int, int] | None:
    """Student steps of the last judged point before the bar is met (0: there is none) and of the first where it is."""
    points = [point for curve in curves for point in curve]
    after = min((step for step, fd in points if fd <= bar), default=None)
    return None if after is None else (max((step for step, _ in points if step < after), default=0), after)


def calls_a_step(row: plan.Row) -> float:
    """Network calls of one student step, one after the other, in expectation."""
    cfg = digits_study.recipe_of(row)
    method = MODELS.build(cfg.model)
    return sum(expected_calls(method, cfg.train_dataloader.batch_size, 1).calls.values()) * method.student_every


class StepTimer(Hook):
    """CPU time at the end of every student step."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if (runner.iter + 1) % runner.model.student_every == 0:
            self.ends.append(time.process_time())


def cpu_seconds(row: plan.Row, student_steps: int) -> float:
    """CPU seconds of one student step with its fake-score steps: the mean over a short run, without its first step."""
    timer = StepTimer()
    with tempfile.TemporaryDirectory() as folder:
        runner = digits_study.runner_of(replace(row, student_steps=student_steps, forwards_of=None), 0, Path(folder))
        runner.register_hook(timer)
        runner.train()
    return mean(end - start for start, end in pairwise(timer.ends))


def measure() -> dict[str, list[float]]:
    """CPU seconds of a student step by method, once a round, all methods in each round."""
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    for _ in range(ROUNDS):
        for method, names in METHODS.items():
            seconds[method].append(round(cpu_seconds(plan.ROWS[names[0]], STUDENT_STEPS), 4))
    return seconds


def load(study: Path) -> dict[str, dict[str, Any]]:
    """Results of every row that the methods have."""
    return {name: json.loads((study / f'{name}.json').read_text()) for names in METHODS.values() for name in names}


def table(results: dict[str, dict[str, Any]], seconds: dict[str, list[float]]) -> str:
    """The page's table."""
    bar, at = min((fd, f'`{name}` after {step} student steps') for name in METHODS[BAR]
                  for step, fd in curve(results[name]))
    rows, most = [], None
    for method, names in METHODS.items():
        forwards, cost = results[names[0]]['forwards_a_step'], mean(seconds[method])
        found = reached((curve(results[name]) for name in names), bar)
        cells = ['never', '', '', f'{min(fd for n in names for _, fd in curve(results[n])):.1f}']
        if found:
            before, after = found
            most = most or after * forwards
            cells[:3] = [f'{before * forwards:,.0f} to {after * forwards:,.0f}', f'{after * forwards / most:.2f}',
                         f'{before * cost:.0f} to {after * cost:.0f}']
        rows.append([method, f'{forwards:g}', f'{calls_a_step(plan.ROWS[names[0]]):.1f}', f'{cost:.2f}', *cells])
    header = ['method', 'forwards a student step', 'calls in sequence', 'CPU seconds a student step',
              f'forwards until FD {bar:.1f}', "share of published DMD2's", 'CPU seconds until then', 'its own best']
    lines = [header, ['---'] * len(header), *rows]
    return f'Bar: {bar:.1f}, {at}.\n\n' + '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def draw(results: dict[str, dict[str, Any]], file: Path) -> None:
    """FD at 4 steps over forwards, every row a line, every method a colour; what runs away leaves the picture."""
    figure, axes = plt.subplots(figsize=(10, 5.5), layout='constrained')
    for index, (method, names) in enumerate(METHODS.items()):
        for name in names:
            forwards = results[name]['forwards_a_step']
            axes.plot(*zip(*((step * forwards, fd) for step, fd in curve(results[name]))), color=f'C{index % 10}',
                      label=method if name == names[0] else None, marker='.', linestyle='--' if index > 9 else '-')
    axes.set(xscale='log', ylim=(8, 40), xlabel='forwards of a sample', ylabel='FD at 4 steps')
    axes.legend(fontsize='small', loc='center left', bbox_to_anchor=(1, 0.5))
    figure.savefig(file, dpi=80)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--study', type=Path, default=Path('docs/study'))
    parser.add_argument('--figure', type=Path, default=Path('docs/time_to_quality.png'))
    parser.add_argument('--measure', action='store_true', help='CPU seconds anew, on one thread: some minutes')
    args = parser.parse_args(argv)
    file = args.study / 'cpu-seconds.json'
    if args.measure:
        torch.set_num_threads(1)
        digits_study.write(file, measure())
    if not file.is_file():
        raise SystemExit(f'{file} is missing: --measure makes it')
    results = load(args.study)
    draw(results, args.figure)
    print(table(results, json.loads(file.read_text())))


if __name__ == '__main__':
    main()
