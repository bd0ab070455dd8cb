"""Writes docs/results.md from what the study on the digits has measured so far.

    python benchmarks/digits_study_report.py

Every table comes from `docs/study/*.json`; the section "What it says" is `docs/study/findings.md`, written by hand, but
for its numbers: `{row}` stands for a row's mean FD at 1, 2, 4 and 8 steps, `{row@4}` for that at 4, `{row@4±}` for it
with its standard deviation, `{row.recall@4}` for another measure, `{row^}` for the FD at 4 steps after each quarter of
the run, and `{row < other@4}` for how much smaller the FD is than the other row's, paired by seed.
"""
import argparse
import json
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import digits_study_plan as plan

STEPS = (1, 2, 3, 4, 6, 8)
Result = dict[str, Any]
Table = list[list[str]]

INTRODUCTION = '''# CDM, DMD2 and DecoupledDMD on the digits

Written by `benchmarks/digits_study_report.py` from the raw results in `docs/study/`; do not edit. `python
benchmarks/digits_study.py --budget-minutes 60` runs more of the study, from where these results stop, on any machine;
with `--only ROW ...`, several processes share the rows. `--compile` makes runs shorter: the same maths to rounding,
and the JSON says of each run whether it was compiled.

Every row is the consistent recipe with the changes that `benchmarks/digits_study_plan.py` states (alpha 1, batch 32,
two fake-score steps a student step for every method, where DMD2's own paper has 5), trained through MMEngine's
runner. The EMA student is judged on {num_samples} samples from the same noise and labels: Fréchet distance (FD) to as
many samples of the guided teacher at 50 steps, in the features of the digits' classifier; FD to 1,000 held-out real
digits; the share of samples that the classifier sees as what was asked for; improved precision and recall against
both sets (3 nearest neighbours). Figures are means over seeds, with the standard deviation between seeds where there
are two or more. Forwards are network forward passes of one sample in one student step, fake-score steps and rollout
included; one with a backward counts as 3. DecoupledDMD has levels that are never shifted
(`model.sigma_shift='none'`), as CDM's authors use it. An FD is biased by the number of samples: the guided teacher at
50 steps, on other noise than the reference, is the floor.
'''

SAMPLES = '''By `benchmarks/digits_samples.py`, seed 0: samples beside those of the teacher at 50 steps and several
guidance scales; the scale that they are nearest to, by a parabola through the smallest distance and its neighbours;
sharpness is the mean squared Laplacian of a picture in [0, 1].
'''

GROUPS = {
    'main': ('Methods', 'The published recipes; `-aware` with the anchor-aware fake score, and `decoupled-dmd-aware` '
             'with CA\'s sigma uncapped too; CDM with all four changes (`cdm-consistent`), at the demo\'s length too, '
             'there on the fixed grid, and with one rollout for both fake-score steps, which is the demo\'s recipe.'),
    'gan': ('The GAN on real pictures', '`dmd2` of the first table with the published GAN (weights 5e-3 and 1e-2) on '
            'the pictures behind the labels, and with weights of 0.1 (`strong`).'),
    'changes': ('The four changes, alone and in pairs', '`cdm-aware` and `cdm-consistent` of the first table belong '
                'here too. A name lists what is changed of the published recipe: `uncapped` CA sigma, `guided` CDM '
                'loss, `aware` fake score, `anchor-points` (sigma_c follows the law of the anchors).'),
    'forwards': ('Equal forwards', 'The baselines, CDM on the fixed grid, and what one rollout for both fake-score '
                 'steps makes of CDM and DMD2, for as many network forwards as `cdm-consistent` has in 200 student '
                 'steps.'),
    'grid': ('Time grid and CDM loss, on the consistent recipe', 'Fixed without the loss is `decoupled-dmd-aware`, '
             'dynamic with it `cdm-consistent`.'),
    'ablations': ('Ablations of the consistent recipe', 'One change each to `cdm-consistent`.'),
    'published': ('Ablations of the published recipe', 'One change each to `cdm`.'),
    'drift': ('What the published recipe\'s own settings do to its drift', 'alpha 7, learning rates 1e-5 and 5e-6, and '
              'batch 128 (4 times the samples a step), one at a time. With alpha 7 the reference is the teacher at '
              'guidance scale 8.'),
    'length': ('Longer training', 'Four times the demo\'s length (400), the quarters over time; twice it, where '
               '`cdm-consistent` has as many forwards as the baselines at four times, and 1,113 student steps, where '
               'CDM on the fixed grid has as many as DMD2.'),
    'low anchors': ('More weight on low anchors', 'Losses measured in velocity (`velocity`), a normaliser that clamps '
                    'at 0.01 (`min-norm`), a fixed grid of 8 levels (`8-levels`); each to be read beside the row '
                    'without the change.'),
    'alpha 0': ('Without guidance', 'alpha 0, without the calls that guidance costs; the reference is the unguided '
                'teacher at 50 steps.'),
    'intervals': ('What tells the fake score the anchor', 'Nothing (`dmd2-one-rollout`), TDM\'s disjoint intervals, '
                  'both; beside `dmd2-aware-one-rollout-equal-forwards`. For as many forwards as `cdm-consistent`.'),
    'variants': ('Variants of DMD2', 'Of `benchmarks/digits_variants.py`: a student that knows the next level, on the '
                 'fixed grid and on the dynamic one; anchors drawn in proportion to 1 / sigma_n; a fake score that '
                 'also receives the anchor\'s noisy input, alone and with the teacher\'s posterior as its target '
                 '(NCVSD). For as many forwards as `cdm-consistent`, beside `dmd2-aware-one-rollout-equal-forwards`.'),
}
PAIRS = (('dmd2-aware', 'dmd2'), ('dmd2-gan', 'dmd2'), ('dmd2-gan-strong', 'dmd2'),
         ('decoupled-dmd-aware', 'decoupled-dmd'), ('cdm-aware', 'cdm'),
         ('cdm-consistent', 'cdm'), ('cdm', 'dmd2'), ('cdm', 'decoupled-dmd'), ('decoupled-dmd-aware', 'dmd2-aware'),
         ('cdm-consistent', 'dmd2-aware'), ('cdm-consistent', 'decoupled-dmd-aware'),
         ('cdm-consistent', 'dmd2-aware-equal-forwards'), ('cdm-consistent', 'decoupled-dmd-aware-equal-forwards'),
         ('cdm-consistent-400', 'cdm-consistent'), ('fixed-grid-with-cdm', 'cdm-consistent'),
         ('fixed-grid-with-cdm', 'decoupled-dmd-aware'),
         ('fixed-grid-with-cdm-equal-forwards', 'dmd2-aware-equal-forwards'),
         ('dynamic-grid-without-cdm', 'cdm-consistent'), ('fixed-grid-with-cdm-400', 'cdm-consistent-400'),
         ('points-on-trajectory', 'cdm-consistent'), ('points-noised', 'cdm-consistent'),
         ('cdm-only', 'cdm-consistent'), ('without-fake-merge', 'cdm-consistent'), ('ca-capped', 'cdm-consistent'),
         ('grid-sigma-low', 'cdm-consistent'), ('fixed-grid-with-cdm', 'dmd2-aware'),
         ('fixed-grid-with-cdm-400', 'dmd2-aware-equal-forwards'),
         ('cdm-consistent-1600', 'dmd2-aware-1600'), ('cdm-consistent-800', 'dmd2-aware-1600'),
         ('cdm-consistent-800', 'decoupled-dmd-aware-1600'), ('cdm-consistent-1600', 'decoupled-dmd-aware-1600'),
         ('fixed-grid-with-cdm-1600', 'cdm-consistent-1600'), ('fixed-grid-with-cdm-1600', 'dmd2-aware-1600'),
         ('fixed-grid-with-cdm-1600', 'decoupled-dmd-aware-1600'), ('fixed-grid-with-cdm-1113', 'dmd2-aware-1600'),
         ('one-rollout', 'cdm-consistent'), ('one-rollout-equal-forwards', 'cdm-consistent'),
         ('dmd2-aware-one-rollout-equal-forwards', 'dmd2-aware-equal-forwards'),
         ('fixed-grid-one-rollout-400', 'fixed-grid-with-cdm-400'),
         ('fixed-grid-one-rollout-400', 'dmd2-aware-one-rollout-equal-forwards'),
         ('fixed-grid-cdm-only-one-rollout-equal-forwards', 'fixed-grid-one-rollout-equal-forwards'),
         ('fixed-grid-one-rollout-velocity-400', 'fixed-grid-one-rollout-400'),
         ('dmd2-aware-one-rollout-velocity-equal-forwards', 'dmd2-aware-one-rollout-equal-forwards'),
         ('dmd2-aware-min-norm', 'dmd2-aware'),
         ('dmd2-aware-one-rollout-8-levels-equal-forwards', 'dmd2-aware-one-rollout-equal-forwards'),
         ('dmd2-aware-one-rollout-equal-forwards', 'dmd2-one-rollout-equal-forwards'),
         ('tdm-equal-forwards', 'dmd2-one-rollout-equal-forwards'),
         ('tdm-equal-forwards', 'dmd2-aware-one-rollout-equal-forwards'),
         ('tdm-aware-equal-forwards', 'tdm-equal-forwards'), ('alpha-0-dmd2-aware', 'alpha-0-dmd2'),
         ('alpha-0-cdm-aware', 'alpha-0-cdm'), ('alpha-0-fixed-grid-with-cdm', 'alpha-0-dmd2-aware'),
         ('alpha-0-cdm-aware', 'alpha-0-dynamic-grid-without-cdm'),
         ('alpha-0-cdm-aware', 'alpha-0-fixed-grid-with-cdm'),
         *((f'dmd2-aware-{name}-one-rollout-equal-forwards', 'dmd2-aware-one-rollout-equal-forwards')
           for name in ('next-level', 'low-anchors', 'input', 'posterior')),
         ('dmd2-aware-dynamic-grid-next-level-one-rollout-equal-forwards',
          'dmd2-aware-dynamic-grid-one-rollout-equal-forwards'))


def spread(values: Sequence[float | None], digits: int) -> str:
    """Mean and standard deviation; 'diverged' if a run was not finite, nothing without runs."""
    if not values:
        return ''
    if None in values:
        return 'diverged'
    mean = f'{statistics.mean(values):.{digits}f}'
    return mean if len(values) == 1 else f'{mean} ± {statistics.stdev(values):.{digits}f}'


def markdown(head: Sequence[str], rows: Table) -> str:
    """A table."""
    lines = ['| ' + ' | '.join(row) + ' |' for row in [list(head), ['---'] * len(head), *rows]]
    return '\n'.join(lines) + '\n'


def final(result: Result, steps: int, measure: str) -> list[float | None]:
    """A measure at the end of every run, at a number of sampling steps."""
    return [entry[measure] for run in result['runs'] for entry in run['final'] if entry['steps'] == steps]


def distances(results: list[Result], measure: str) -> str:
    """FD by sampling steps."""
    rows = [[r['row'], str(len(r['runs'])), str(r['student_steps']), f'{r["forwards_a_step"]:g}']
            + [spread(final(r, steps, measure), 1) for steps in STEPS] for r in results]
    return markdown(['row', 'seeds', 'student steps', 'forwards', *(steps_name(steps) for steps in STEPS)], rows)


def steps_name(number: int) -> str:
    """In words."""
    return f'{number} step' if number == 1 else f'{number} steps'


def quality(results: list[Result]) -> str:
    """Accuracy, precision and recall at 4 steps."""
    measures = ('accuracy', 'precision', 'recall', 'precision_real', 'recall_real')
    rows = [[r['row']] + [spread(final(r, 4, measure), 3) for measure in measures] for r in results]
    return markdown(['row, at 4 steps', 'accuracy', 'precision', 'recall', 'precision (real)', 'recall (real)'], rows)


def curves(results: list[Result]) -> str:
    """FD at 4 steps over training."""
    rows = []
    for r in results:
        points = zip(*([*(e['fd'] for e in run['curve']), *(e['fd'] for e in run['final'] if e['steps'] == 4)]
                       for run in r['runs']))
        total = f'{r["student_steps"] * r["forwards_a_step"]:,.0f}'
        rows.append([r['row'], *(spread(values, 1) for values in points), total])
    return markdown(['row, FD at 4 steps', '1/4 of the run', '1/2', '3/4', 'the end', 'forwards of the run'], rows)


def differences(results: dict[str, Result]) -> str:
    """FD of one row less that of another on the same seed, so on the same draws."""
    rows = []
    for one, other in PAIRS:
        if one in results and other in results:
            both = {steps: less(results[one], results[other], steps) for steps in STEPS}
            count = len(both[1][0])
            cells = [f'{spread([None if v is None else -v for v in values], 1)} ({smaller}/{count})' if count else ''
                     for values, smaller in both.values()]
            rows.append([f'{one} - {other}', str(count), *cells])
    return markdown(['FD, paired by seed', 'seeds', *(steps_name(steps) for steps in STEPS)], rows)


def less(one: Result, other: Result, steps: int) -> tuple[list[float | None], int]:
    """FD of the other row less that of the first on each seed that both have, and on how many it is smaller."""
    a, b = ({run['seed']: {e['steps']: e['fd'] for e in run['final']}[steps] for run in r['runs']}
            for r in (one, other))
    pairs = [(a[seed], b[seed]) for seed in sorted(a.keys() & b.keys())]
    return ([None if None in pair else pair[1] - pair[0] for pair in pairs],
            sum(None not in pair and pair[0] < pair[1] for pair in pairs))


def fill(text: str, results: dict[str, Result]) -> str:
    """Numbers in place of `{row...}`, as the docstring of this file says.

    Raises:
        KeyError: A row has not run.
    """
    def number(match: re.Match[str]) -> str:
        row, other, at, measure, steps, kind = match.groups()
        if other:
            values, smaller = less(results[row], results[other], int(at))
            return f'{spread(values, 1)} on {smaller} of {len(values)} seeds'
        if kind == '^':
            ends = final(results[row], 4, 'fd')
            quarters = zip(*([e['fd'] for e in run['curve']] for run in results[row]['runs']))
            return listed(spread(values, 1).split()[0] for values in (*quarters, ends))
        digits = 1 if (measure or 'fd').startswith('fd') else 2
        means = [spread(final(results[row], int(step), measure or 'fd'), digits) for step in (steps or '1248')]
        return means[0] if kind == '±' else listed(mean.split()[0] for mean in means)

    return re.sub(r'\{([\w-]+)(?:\s<\s([\w-]+)@(\d)|(?:\.(\w+))?(?:@(\d))?([\^±])?)\}', number, text)


def listed(words: Iterable[str]) -> str:
    """Words with commas and "and"."""
    *most, last = words
    return f'{", ".join(most)} and {last}' if most else last


def teacher(result: Result) -> str:
    """The teacher's own rows; a guided step is two forwards."""
    rows = [[f'{name}, {steps_name(e["steps"])}', f'{e["fd"]:.1f}', f'{e["fd_real"]:.1f}',
             *(f'{e[m]:.3f}' for m in ('accuracy', 'precision', 'recall', 'precision_real', 'recall_real'))]
            for name in plan.TEACHERS for e in result.get(name, ())]
    return markdown(['teacher', 'FD', 'FD (real)', 'accuracy', 'precision', 'recall', 'precision (real)',
                     'recall (real)'], rows)


def samples(result: dict[str, Any]) -> str:
    """What `digits_samples.py` has measured, a row a sampler."""
    scales = ('1.0', '1.5', '2.0', '2.5')
    rows = [[f'{name}, {key}', f'{e["scale"]:.2f}', *(f'{e["fd"][scale]:.1f}' for scale in scales),
             f'{e["fd_real"]:.1f}', f'{e["sharpness"]:.3f}', f'{e["accuracy"]:.3f}']
            for name, entries in result['rows'].items() for key, e in entries.items()]
    return markdown(['samples', 'nearest guidance scale', *(f'FD to scale {float(scale):g}' for scale in scales),
                     'FD to real digits', 'sharpness', 'accuracy'], rows)


def coverage(results: dict[str, Result]) -> str:
    """What has run of what is planned."""
    done = {name: len(r['runs']) for name, r in results.items()}
    seconds = sum(run['seconds'] for r in results.values() for run in r['runs'])
    rows = []
    for group, (title, _) in GROUPS.items():
        planned = {name: row.seeds for name, row in plan.ROWS.items() if row.group == group}
        short = [f'`{name}` {done[name]} of {seeds}' for name, seeds in planned.items()
                 if 0 < done.get(name, 0) < seeds]
        missing = [f'`{name}`' for name in planned if name not in done]
        rows.append([title, f'{sum(done.get(name, 0) for name in planned)} of {sum(planned.values())}',
                     ', '.join(short), 'all' if len(missing) == len(planned) else ', '.join(missing)])
    wanted = sum(row.seeds for row in plan.ROWS.values())
    return (f'**{sum(done.values())} of {wanted} runs are done** (a run is a row on one seed), {len(done)} of '
            f'{len(plan.ROWS)} rows, in {seconds / 60:.0f} minutes of one CPU core.\n\n'
            + markdown(['table', 'runs', 'on fewer seeds than planned', 'rows not run'], rows))


def report(study: Path) -> str:
    """The whole page."""
    files = [json.loads(file.read_text()) for file in sorted(study.glob('*.json'))]
    results = {r['row']: r for r in files if r.get('runs')}
    results = {name: results[name] for name in plan.ROWS if name in results}
    teachers = [r for r in files if 'guided' in r]
    parts = [INTRODUCTION.format(num_samples=f'{files[0]["num_samples"]:,}'), '## What has run\n', coverage(results)]
    findings = study / 'findings.md'
    if findings.is_file():
        parts += ['## What it says\n', fill(findings.read_text(encoding='utf-8'), results)]
    for result in teachers:
        parts += ['## Teacher\n', teacher(result)]
    file = study / 'samples.json'
    if file.is_file():
        parts += ['## What is left in the samples\n', SAMPLES, samples(json.loads(file.read_text()))]
    for group, (title, text) in GROUPS.items():
        rows = [r for name, r in results.items() if plan.ROWS[name].group == group]
        if rows:
            parts += [f'## {title}\n', text + '\n',
                      f'FD to the {"un" if group == "alpha 0" else ""}guided teacher\'s samples at the end:\n',
                      distances(rows, 'fd'),
                      'FD to held-out real digits at the end:\n', distances(rows, 'fd_real'),
                      quality(rows), curves(rows)]
    if any(one in results and other in results for one, other in PAIRS):
        parts += ['## Differences\n', 'In brackets, on how many seeds the first row has the smaller FD.\n',
                  differences(results)]
    return '\n'.join(parts)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--study', type=Path, default=Path('docs/study'))
    parser.add_argument('--out', type=Path, default=Path('docs/results.md'))
    args = parser.parse_args(argv)
    if not any(args.study.glob('*.json')):
        raise SystemExit(f'{args.study} holds no results: run benchmarks/digits_study.py first')
    args.out.write_text(report(args.study), encoding='utf-8')
    print(args.out)


if __name__ == '__main__':
    main()
