"""What an evaluation leaves for people and for programs: results.json, scores.csv, results.md and the contact sheet."""
import csv
import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, stack
from torch.nn.functional import interpolate

from cdm_plugin.commands.evaluate.entries import Entry
from cdm_plugin.commands.evaluate.generate import Prompt, image_file, write_json
from cdm_plugin.commands.evaluate.metrics import Scores
from cdm_plugin.data.images import read_image
from cdm_plugin.metrics.bootstrap import Interval, bootstrap_mean, wins
from cdm_plugin.sheets import SHEET_SIDE, labelled_grid, save_png
from cdm_plugin.version import __version__

SHEET_COLUMNS = 10


@dataclass(frozen=True)
class Win:
    """How often the images of `model` have a higher score of `metric` than those of `over` from the same noise."""
    metric: str
    model: str
    over: str
    rate: Interval


def win_rates(scores: dict[str, Scores], confidence: float, resamples: int) -> list[Win]:
    """Win rates of all ordered pairs of models, by every score of images.

    Args:
        scores (dict): Scores by the entries' names.
        confidence, resamples: Of the intervals, see `bootstrap_mean`.
    """
    names = list(dict.fromkeys(name for own in scores.values() for name in own.images))
    return [Win(name, a, b, bootstrap_mean(wins(scores[a].images[name], scores[b].images[name]).mean(1), confidence,
                                           resamples))
            for name in names for a, b in itertools.permutations([m for m in scores if name in scores[m].images], 2)]


def write_results(out: Path, about: dict[str, Any], entries: Sequence[Entry], how: dict[str, dict[str, Any]],
                  prompts: Sequence[Prompt], scores: dict[str, Scores], rates: Sequence[Win],
                  missing: dict[str, str]) -> Path:
    """Writes results.json, results.md and, where there are scores of images, scores.csv.

    Args:
        out (Path): The evaluation's folder.
        about (dict): What holds for all models, JSON values: `prompts_file`, `seed`, `confidence`, ...
        entries (Sequence[Entry]): The models.
        how (dict): Name -> `steps`, `guidance_scale` and `calls` of its images.
        prompts (Sequence): Texts or class labels.
        scores (dict): Name -> its Scores.
        rates (Sequence[Win]): The win rates.
        missing (dict): Metrics that could not run, with the reason.

    Returns:
        Path: results.json.
    """
    table = format_table(how, scores, len(prompts) * about['images_a_prompt'])
    (out / 'results.md').write_text(_page(about, table, rates, list(scores), missing), encoding='utf-8')
    names = list(dict.fromkeys(name for own in scores.values() for name in own.images))
    (out / 'scores.csv').unlink(missing_ok=True)
    if names:
        with open(out / 'scores.csv', 'w', newline='', encoding='utf-8') as file:
            writer = csv.writer(file)
            writer.writerow(['model', 'index', 'draw', 'prompt', *names])
            for model, own in scores.items():
                for i, draw in itertools.product(range(len(prompts)), range(about['images_a_prompt'])):
                    values = (repr(float(own.images[name][i, draw])) if name in own.images else '' for name in names)
                    writer.writerow([model, i, draw, prompts[i], *values])
    return write_json(dict(
        version=__version__, **about, missing=missing,
        models=[dict(name=entry.name, source=entry.source, checkpoint=entry.checkpoint, role=entry.role,
                     ema=entry.ema, **how[entry.name],
                     metrics={name: value._asdict() for name, value in scores[entry.name].values.items()})
                for entry in entries],
        wins=[dict(asdict(win), rate=win.rate._asdict()) for win in rates]), out / 'results.json')


def format_table(how: dict[str, dict[str, Any]], scores: dict[str, Scores], images: int) -> str:
    """The comparison of all models, in Markdown."""
    names = list(dict.fromkeys(name for own in scores.values() for name in own.values))
    rows = [['model', 'steps', 'network calls', 'images', *names]]
    for model, own in scores.items():
        rows.append([model, str(how[model]['steps']), str(how[model]['calls']), str(images),
                     *(_cell(own.values[name]) if name in own.values else '' for name in names)])
    return _markdown(rows)


def _page(about: dict[str, Any], table: str, rates: Sequence[Win], models: Sequence[str],
          missing: dict[str, str]) -> str:
    count, percent = about['prompts'], f'{100 * about["confidence"]:g}%'
    parts = [f'{count} prompts of `{about["prompts_file"]}`, images each: {about["images_a_prompt"]}, seed '
             f'{about["seed"]}; every model starts from the same noise. In brackets: {percent} intervals over prompts, '
             f'of means of scores by a bootstrap with {about["resamples"]} resamples, of values of whole sets by a '
             'jackknife that leaves out a tenth of the prompts at a time (a bootstrap would count doubles).', table]
    for metric in dict.fromkeys(win.metric for win in rates):
        cells = {(win.model, win.over): _cell(win.rate) for win in rates if win.metric == metric}
        rows = [['', *models], *([a, *(cells.get((a, b), '') for b in models)] for a in models)]
        parts += [f'Share of images of the row with a higher `{metric}` than those of the column from the same noise; '
                  'ties count half.', _markdown(rows)]
    parts += [f'{name} has no value: {reason}' for name, reason in missing.items()]
    return '\n\n'.join(parts) + '\n'


def _cell(value: Interval) -> str:
    if value.low is None:
        return f'{value.value:.4g}'
    return f'{value.value:.4g} [{value.low:.4g}, {value.high:.4g}]'


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = ['| ' + ' | '.join(row) + ' |' for row in rows]
    return '\n'.join([lines[0], '| ' + ' | '.join('---' for _ in rows[0]) + ' |', *lines[1:]])


def write_sheet(out: Path, entries: Sequence[Entry], count: int, num: int) -> Path:
    """Writes the contact sheet, a row a model, a column a prompt (the first ones), and returns its path."""
    columns = range(min(count, SHEET_COLUMNS))
    rows = {entry.name: [read_image(image_file(out, entry, i * num), channels=None) for i in columns]
            for entry in entries}
    sides = np.array([images[0].shape[-2:] for images in rows.values()])
    height, width = sides.min(0)
    shrink = min(1.0, SHEET_SIDE / max(height, width))
    size = max(1, round(height * shrink)), max(1, round(width * shrink))
    return save_png(labelled_grid({name: _resized(stack(images), size) for name, images in rows.items()}),
                    out / 'grid.png')


def _resized(images: Tensor, size: Sequence[int]) -> Tensor:
    return images if tuple(images.shape[-2:]) == tuple(size) else interpolate(images, size=tuple(size), mode='area')
