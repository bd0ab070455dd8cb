"""The emoji study's results as tables in Markdown."""
import statistics
from typing import Any

STEPS = (1, 2, 4, 8)


def table(results: dict[str, Any], part: str) -> str:
    """The results on one part of the captions."""
    head = ['model', 'seeds', *(f'{name}, {steps_name(steps)}' for name in ('FD', 'retrieval@1') for steps in STEPS)]
    lines = [head, ['---'] * len(head)]
    for name, scores in (('real pictures', results['real']), ('through the autoencoder', results.get('autoencoder'))):
        if scores:
            lines.append([name, '', '', '', '', '', f'{scores[part]["retrieval@1"]:.3f}', '', '', ''])
    for name, runs in {'teacher, guided': [dict(final=results['teacher'])], **results['rows']}.items():
        if runs:
            cells = [_spread([entry[part][key] for run in runs for entry in run['final'] if entry['steps'] == steps],
                             digits) for key, digits in (('fd', 2), ('retrieval@1', 3)) for steps in STEPS]
            lines.append([name, '' if name == 'teacher, guided' else str(len(runs)), *cells])
    return _markdown(lines)


def curves(results: dict[str, Any]) -> str:
    """FD at 4 steps on held-out captions over the training."""
    head = ['model', 'seeds', 'student steps', 'FD after a quarter', 'half', 'three quarters', 'all']
    lines = [head, ['---'] * len(head)]
    for name, runs in results['rows'].items():
        runs = [run for run in runs if 'curve' in run]
        if runs:
            last = [entry['held_out'] for run in runs for entry in run['final'] if entry['steps'] == 4]
            points = [*zip(*(run['curve'] for run in runs)), last]
            lines.append([name, str(len(runs)), str(2 * runs[0]['curve'][1]['student_steps']),
                          *(_spread([entry['fd'] for entry in point], 2) for point in points)])
    return _markdown(lines) if len(lines) > 2 else ''


def kernel_distances(results: dict[str, Any]) -> str:
    """Kernel distances in the space of the public encoder, of the runs that have them."""
    head = ['model', 'seeds', *(f'KD to {name}, {steps_name(steps)}' for name in ('teacher', 'real')
                                for steps in STEPS)]
    lines = [head, ['---'] * len(head)]
    for name, runs in {'teacher, guided': [dict(final=results['teacher'])], **results['rows']}.items():
        runs = [run for run in runs if 'kd' in run['final'][0]['held_out']]
        if runs:
            cells = [_spread([entry['held_out'][key] for run in runs for entry in run['final']
                              if entry['steps'] == steps], 1) for key in ('kd', 'kd_real') for steps in STEPS]
            lines.append([name, '' if name == 'teacher, guided' else str(len(runs)), *cells])
    return _markdown(lines) if len(lines) > 2 else ''


def _spread(values: list[float | None], digits: int) -> str:
    """Mean and standard deviation."""
    if None in values:
        return 'diverged'
    deviation = f' ± {statistics.stdev(values):.{digits}f}' if len(values) > 1 else ''
    return f'{statistics.mean(values):.{digits}f}{deviation}'


def _markdown(lines: list[list[str]]) -> str:
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines) + '\n'


def steps_name(steps: int) -> str:
    """In words."""
    return f'{steps} step' if steps == 1 else f'{steps} steps'
