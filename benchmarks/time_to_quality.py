"""Forwards until a student is as good as published DMD2 ever is, from the study's raw data: no training.

    python benchmarks/time_to_quality.py        # a minute: it counts each method's calls on the digits' network

The bar is the smallest mean over the seeds that a judged point of published DMD2's runs has, FD at 4 steps. A run is
judged after each quarter, so a method is there between two points of one run. Of the runs of a method, of several
lengths, the one counts that is there first. Prints a table in Markdown.
"""
import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Any

import digits_study
import digits_study_plan as plan
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
    'CDM, consistent, fixed grid, one rollout (the demo)': ('fixed-grid-one-rollout-400',),
    'the same, losses in velocity': ('fixed-grid-one-rollout-velocity-400',),
    'DMD2, aware, one rollout, losses in velocity': ('dmd2-aware-one-rollout-velocity-equal-forwards',),
    'TDM, one rollout': ('tdm-one-rollout', 'tdm-equal-forwards')}
BAR = 'DMD2, published'
Point = tuple[int, float]


def curve(result: dict[str, Any], steps: int = 4) -> list[Point]:
    """Student steps of every judged point of a row, and the mean FD there; points that a run lacks are left out."""
    runs = [[*((e['student_steps'], e['fd']) for e in run['curve']),
             *((result['student_steps'], e['fd']) for e in run['final'] if e['steps'] == steps)]
            for run in result['runs']]
    return [(points[0][0], mean(fd for _, fd in points)) for points in zip(*runs)
            if None not in [fd for _, fd in points]]


def reached(points: list[Point], bar: float) -> tuple[int, int] | None:
    """Student steps of the last judged point before the bar is met (0: there is none) and of the first where it is."""
    before = 0
    for step, fd in points:
        if fd <= bar:
            return before, step
        before = step
    return None


def calls_a_step(row: plan.Row) -> float:
    """Network calls of one student step, one after the other, in expectation."""
    cfg = digits_study.recipe_of(row)
    method = MODELS.build(cfg.model)
    return sum(expected_calls(method, cfg.train_dataloader.batch_size, 1).calls.values()) * method.student_every


def table(study: Path) -> str:
    """The page's table."""
    results = {name: json.loads((study / f'{name}.json').read_text()) for names in METHODS.values() for name in names}
    bar, at = min((fd, f'`{name}` after {step} student steps') for name in METHODS[BAR]
                  for step, fd in curve(results[name]))
    rows, most = [], None
    for method, names in METHODS.items():
        forwards = results[names[0]]['forwards_a_step']
        found = [(after, before) for before, after in filter(None, (reached(curve(results[n]), bar) for n in names))]
        cells = ['never', '', f'{min(fd for n in names for _, fd in curve(results[n])):.1f}']
        if found:
            after, before = min(found)
            most = most or after * forwards
            cells[:2] = [f'{before * forwards:,.0f} to {after * forwards:,.0f}', f'{after * forwards / most:.2f}']
        rows.append([method, f'{forwards:g}', f'{calls_a_step(plan.ROWS[names[0]]):.1f}', *cells])
    header = ['method', 'forwards a student step', 'calls in sequence', f'forwards until FD {bar:.1f}',
              "share of published DMD2's", 'its own best']
    lines = [header, ['---'] * len(header), *rows]
    return f'Bar: {bar:.1f}, {at}.\n\n' + '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--study', type=Path, default=Path('docs/study'))
    args = parser.parse_args(argv)
    print(table(args.study))


if __name__ == '__main__':
    main()
