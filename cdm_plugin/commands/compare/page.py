"""One HTML file that shows runs: `page.html` beside this, with the runs' data in it as JSON."""
import base64
import bisect
import io
import json
import math
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import numpy as np
from PIL import Image

from cdm_plugin.commands.compare.runs import Run, config_differences
from cdm_plugin.files import whole_file
from cdm_plugin.version import __version__

# What one page holds, so that a browser opens it at once.
MAX_POINTS = 500  # of a curve
MAX_TIMES = 24  # of a run's sample grids, fewer where there are more than MAX_IMAGES of them in all
MAX_IMAGES = 160
MAX_IMAGE_BYTES = 6_400_000  # of all images, before base64 makes 4 bytes of 3
MAX_HISTOGRAMS = 100  # of a run
MAX_VALUE = 400  # characters of a config's value
MIN_SIDE = 64
Time = TypeVar('Time', int, float)


def write_page(runs: Sequence[Run], path: str | Path, reload: int | None = None) -> Path:
    """Writes the page and returns its path; makes the folder.

    The page needs nothing but itself: no server, no other file, no connection. More than MAX_IMAGES sample grids lie in
    a folder beside it, `<its name>_grids`, and are read when they are shown.

    Args:
        runs (Sequence[Run]): What it shows.
        path (str): The HTML file.
        reload (int, optional): Seconds after which an open page reads its file again, and keeps what is chosen on it.
            Default: never.

    Raises:
        ValueError: If the path is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f'--out must be the HTML file to write, but {str(path)!r} is a folder')
    # `<` is what could end the script element that holds the data.
    shown = dict(page_data(runs, path.with_name(f'{path.stem}_grids')), reload=reload)
    data = json.dumps(shown, allow_nan=False, separators=(',', ':')).replace('<', '\\u003c')
    page = (Path(__file__).parent / 'page.html').read_text(encoding='utf-8').replace('{{data}}', data)
    with whole_file(path) as part:
        part.write_text(page, encoding='utf-8')
    return path


def page_data(runs: Sequence[Run], folder: Path | None = None) -> dict[str, Any]:
    """What the page shows, as JSON values.

    Args:
        runs (Sequence[Run]): The runs.
        folder (Path, optional): Where grids go that are too many for the page; made if need be. Default: some are
            left out.

    Returns:
        dict: `version`, `date`, `notes` (what was left out or shrunk), `runs`, `config`, and `times`, at which the
        grids were chosen, in `unit`s ('student step', or 'iteration' where a run's student steps are not known). A run
        has `scalars` (name -> `steps` and `values`, None where a value is not finite), `grids` (name -> iteration ->
        URL, of data or beside the page) and `histograms` (iteration -> `edges` and `counts`); `config` has a row a key,
        with the runs' values.
    """
    notes: list[str] = []
    unit = 'student step' if all(run.student_every for run in runs) else 'iteration'
    clocks = [run.student_every if unit == 'student step' else 1 for run in runs]
    if folder is not None and sum(len(grid) for run in runs for grid in run.grids.values()) > MAX_IMAGES:
        times, grids = _logged_times(runs, clocks), _place_grids(runs, folder, notes)
    else:
        times = _grid_times(runs, clocks, notes)
        grids = _embed_grids(runs, clocks, times, notes)
    scalars = [{name: _thin(series) for name, series in sorted(run.scalars.items()) if series} for run in runs]
    if any(len(series['steps']) < len(run.scalars[name]) for run, own in zip(runs, scalars)
           for name, series in own.items()):
        notes.append(f'Curves of more than {MAX_POINTS} points are drawn through the lowest and the highest value of '
                     f'each of {MAX_POINTS // 2} equal stretches.')
    configs = [run.config for run in runs]
    return dict(
        version=__version__, date=datetime.now().isoformat(' ', 'minutes'), notes=notes, unit=unit, times=times,
        runs=[dict(name=run.name, method=run.config.get('model.type', '').strip('\'"').split('.')[-1],
                   student_every=run.student_every, iterations=run.steps[-1], restarts=run.restarts,
                   metrics=sorted(run.metrics), scalars=own, grids=images,
                   histograms={step: vars(run.histograms[step])
                               for step in _spread(sorted(run.histograms), MAX_HISTOGRAMS)})
              for run, own, images in zip(runs, scalars, grids)],
        config=[dict(key=key, differs=differs, values=[_cut(config.get(key)) for config in configs])
                for key, differs in config_differences(configs).items()])


def _cut(text: str | None) -> str | None:
    if text is None or len(text) <= MAX_VALUE:
        return text
    return f'{text[:MAX_VALUE]}... ({len(text)} characters)'


def _thin(series: dict[int, float]) -> dict[str, list]:
    """At most MAX_POINTS of a curve's points, its extremes and its last among them."""
    steps = sorted(series)
    if len(steps) > MAX_POINTS:
        kept = {steps[-1]}
        for stretch in np.array_split(steps, MAX_POINTS // 2)[:-1]:
            finite = [int(step) for step in stretch if math.isfinite(series[step])] or [int(stretch[0])]
            kept |= {min(finite, key=series.__getitem__), max(finite, key=series.__getitem__)}
        steps = sorted(kept)
    return dict(steps=steps, values=[series[step] if math.isfinite(series[step]) else None for step in steps])


def _logged_times(runs: Sequence[Run], clocks: list[int]) -> list[float]:
    return sorted({step / clock for run, clock in zip(runs, clocks) for grid in run.grids.values() for step in grid})


def _place_grids(runs: Sequence[Run], folder: Path, notes: list[str]) -> list[dict[str, dict[int, str]]]:
    """Each run's grids in the folder, as they are, and their URLs from beside it. Those of an earlier page go."""
    folder.mkdir(parents=True, exist_ok=True)
    known = {path.name for path in folder.glob('*.png') if path.stem.endswith(f'_{path.stat().st_size}')}
    placed: list[dict[str, dict[int, str]]] = []
    for i, run in enumerate(runs):
        placed.append({name: {} for name in sorted(run.grids)})
        for name, step, source in [(n, s, grid[s]) for n, grid in sorted(run.grids.items()) for s in sorted(grid)]:
            size = len(source) if isinstance(source, bytes) else source.stat().st_size
            file = folder / f'{i}_{name}_{step}_{size}.png'
            if file.name not in known:
                file.write_bytes(source if isinstance(source, bytes) else source.read_bytes())
            known.discard(file.name)
            placed[-1][name][step] = f'{quote(folder.name)}/{file.name}'
    for name in known:
        (folder / name).unlink()
    notes.append(f'The sample grids lie in the folder {folder.name} beside this page: keep them together.')
    return placed


def _grid_times(runs: Sequence[Run], clocks: list[int], notes: list[str]) -> list[float]:
    """At most MAX_TIMES times, iterations / clock, at which all runs' sample grids are shown."""
    count = sum(len(run.grids) for run in runs)
    logged = _logged_times(runs, clocks)
    times = _spread(logged, max(4, min(MAX_TIMES, MAX_IMAGES // max(count, 1))))
    if len(times) < len(logged):
        notes.append(f'Sample grids are shown at {len(times)} of {len(logged)} points of training time.')
    return times


def _embed_grids(runs: Sequence[Run], clocks: list[int], times: list[float],
                 notes: list[str]) -> list[dict[str, dict[int, str]]]:
    """Each run's grids as data URLs, the latest at each time."""
    chosen = [{name: _latest(sorted(grid), clock, times) for name, grid in sorted(run.grids.items())}
              for run, clock in zip(runs, clocks)]
    total = sum(len(steps) for own in chosen for steps in own.values())
    embedded: list[dict[str, dict[int, str]]] = []
    smallest = 1.0
    for run, own in zip(runs, chosen):
        embedded.append({name: {} for name in own})
        for name, step in [(name, step) for name, steps in own.items() for step in steps]:
            url, scale = _data_url(run.grids[name][step], MAX_IMAGE_BYTES // total)
            embedded[-1][name][step], smallest = url, min(smallest, scale)
    if smallest < 1:
        notes.append(f'Sample grids are shrunk, down to {smallest:.0%} of their width, to keep the page small.')
    return embedded


def _spread(values: list[Time], count: int) -> list[Time]:
    """At most `count` of the values, evenly, the first and the last among them."""
    if len(values) <= count:
        return values
    return [values[i] for i in np.linspace(0, len(values) - 1, count).round().astype(int)]


def _latest(steps: list[int], clock: int, times: list[float]) -> list[int]:
    """Those of the ascending iterations that are the latest at some time."""
    counts = {bisect.bisect([step / clock for step in steps], time) for time in times}
    return [steps[n - 1] for n in sorted(counts) if n]


def _data_url(source: Path | bytes, limit: int) -> tuple[str, float]:
    """A PNG of at most `limit` bytes, else a JPEG, shrunk until it has no more; and its scale."""
    data = source if isinstance(source, bytes) else source.read_bytes()
    image, kind, scale = Image.open(io.BytesIO(data)).convert('RGB'), 'png', 1.0
    if len(data) <= 8 * limit:  # OpenCV, which wrote it, packs loosely; photographs stay too large all the same
        data = _encode(image, 'png', optimize=True)
    if len(data) > limit:
        kind, data = 'jpeg', _encode(image, 'jpeg', quality=80)
    while len(data) > limit and min(image.size) * scale > MIN_SIDE:
        scale = max(scale * min(0.9, math.sqrt(limit / len(data))), MIN_SIDE / min(image.size))
        size = (round(image.width * scale), round(image.height * scale))
        data = _encode(image.resize(size, Image.Resampling.LANCZOS), 'jpeg', quality=80)
    return f'data:image/{kind};base64,{base64.b64encode(data).decode()}', scale


def _encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
