"""One HTML file that shows runs: `page.html` beside this, with the runs' data in it as JSON."""
import base64
import io
import json
import math
from datetime import datetime
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import numpy as np
from PIL import Image

from cdm_plugin.version import __version__

from .runs import Run, config_differences

# What one page holds, so that a browser opens it at once.
MAX_POINTS = 1000  # of a curve
MAX_TIMES = 24  # of a run's sample grids, fewer where there are more than MAX_IMAGES of them in all
MAX_IMAGES = 240
MAX_IMAGE_BYTES = 6_000_000  # of all images, before base64 makes 4 bytes of 3
MAX_HISTOGRAMS = 100  # of a run
MAX_VALUE = 400  # characters of a config's value
MIN_SIDE = 64


def write_page(runs: Sequence[Run], path: Union[str, Path]) -> Path:
    """Writes the page and returns its path; makes the folder.

    The page needs nothing but itself: no server, no other file, no connection.
    """
    # `<` is what could end the script element that holds the data.
    data = json.dumps(page_data(runs), allow_nan=False, separators=(',', ':')).replace('<', '\\u003c')
    page = (Path(__file__).parent / 'page.html').read_text(encoding='utf-8').replace('{{data}}', data)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding='utf-8')
    return path


def page_data(runs: Sequence[Run]) -> Dict[str, Any]:
    """What the page shows, as JSON values.

    Returns:
        dict: `version`, `date`, `notes` (what was left out or shrunk), `runs` and `config`. A run has `scalars` (name
        -> `steps` and `values`, None where a value is not finite), `grids` (name -> iterations -> data URL),
        `histograms`; `config` has a row a key, with the runs' values.
    """
    notes: List[str] = []
    grids = _embed_grids(runs, notes)
    scalars = [{name: _thin(series) for name, series in sorted(run.scalars.items()) if series} for run in runs]
    if any(len(series['steps']) < len(run.scalars[name]) for run, own in zip(runs, scalars)
           for name, series in own.items()):
        notes.append(f'Curves of more than {MAX_POINTS} points are drawn through the lowest and the highest value of '
                     f'each of {MAX_POINTS // 2} equal stretches.')
    configs = [run.config for run in runs]
    return dict(
        version=__version__, date=datetime.now().isoformat(' ', 'minutes'), notes=notes,
        runs=[dict(name=run.name, method=run.config.get('model.type', '').strip('\'"'),
                   student_every=run.student_every, iterations=run.steps[-1], restarts=run.restarts,
                   metrics=sorted(run.metrics), scalars=own, grids=images,
                   histograms={step: vars(run.histograms[step])
                               for step in _spread(sorted(run.histograms), MAX_HISTOGRAMS)})
              for run, own, images in zip(runs, scalars, grids)],
        config=[dict(key=key, differs=differs, values=[_cut(config.get(key)) for config in configs])
                for key, differs in config_differences(configs).items()])


def _cut(text: Optional[str]) -> Optional[str]:
    if text is None or len(text) <= MAX_VALUE:
        return text
    return f'{text[:MAX_VALUE]}... ({len(text)} characters)'


def _thin(series: Dict[int, float]) -> Dict[str, list]:
    """At most MAX_POINTS of a curve's points, its extremes and its last among them."""
    steps = sorted(series)
    if len(steps) > MAX_POINTS:
        kept = {steps[-1]}
        for stretch in np.array_split(steps, MAX_POINTS // 2)[:-1]:
            finite = [int(step) for step in stretch if math.isfinite(series[step])] or [int(stretch[0])]
            kept |= {min(finite, key=series.get), max(finite, key=series.get)}
        steps = sorted(kept)
    return dict(steps=steps, values=[series[step] if math.isfinite(series[step]) else None for step in steps])


def _embed_grids(runs: Sequence[Run], notes: List[str]) -> List[Dict[str, Dict[int, str]]]:
    """The runs' sample grids as data URLs, at common times."""
    together = all(run.student_every for run in runs)  # then time is counted in student steps, else in iterations

    def time(run: Run, step: int) -> float:
        return step / run.student_every if together else step

    count = sum(len(run.grids) for run in runs)
    logged = sorted({time(run, step) for run in runs for grid in run.grids.values() for step in grid})
    times = _spread(logged, max(4, min(MAX_TIMES, MAX_IMAGES // max(count, 1))))
    if len(times) < len(logged):
        notes.append(f'Sample grids are shown at {len(times)} of {len(logged)} points of training time.')
    chosen = [{name: _latest(grid, times, lambda step, run=run: time(run, step)) for name, grid in run.grids.items()}
              for run in runs]
    total = sum(len(steps) for own in chosen for steps in own.values())
    embedded, smallest = [], 1.0
    for run, own in zip(runs, chosen):
        embedded.append({})
        for name, steps in sorted(own.items()):
            urls = embedded[-1][name] = {}
            for step in steps:
                urls[step], scale = _data_url(run.grids[name][step], MAX_IMAGE_BYTES // total)
                smallest = min(smallest, scale)
    if smallest < 1:
        notes.append(f'Sample grids are shrunk, down to {smallest:.0%} of their width, to keep the page small.')
    return embedded


def _spread(values: List[float], count: int) -> List[float]:
    """At most `count` of the values, evenly, the first and the last among them."""
    if len(values) <= count:
        return values
    return [values[i] for i in np.linspace(0, len(values) - 1, count).round().astype(int)]


def _latest(grid: Dict[int, Any], times: List[float], time: Any) -> List[int]:
    """For each time the latest grid until then."""
    until = [[step for step in grid if time(step) <= t] for t in times]
    return sorted({max(steps) for steps in until if steps})


def _data_url(source: Union[Path, bytes], limit: int) -> Tuple[str, float]:
    """A picture as PNG if that has at most `limit` bytes, else as JPEG, shrunk until it does; and its scale."""
    image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source).convert('RGB')
    kind, scale, data = 'png', 1.0, _encode(image, 'png', optimize=True)
    if len(data) > limit:
        kind, data = 'jpeg', _encode(image, 'jpeg', quality=85)
    while len(data) > limit and min(image.size) * scale * 0.8 >= MIN_SIDE:
        scale *= 0.8
        size = (round(image.width * scale), round(image.height * scale))
        data = _encode(image.resize(size, Image.Resampling.LANCZOS), 'jpeg', quality=85)
    return f'data:image/{kind};base64,{base64.b64encode(data).decode()}', scale


def _encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
