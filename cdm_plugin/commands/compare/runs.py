"""Reads back what MMEngine's visualizer backends have logged into work directories."""
import ast
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmengine.registry import MODELS
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cdm_plugin.methods import DiffusionModel
from cdm_plugin.registry import is_type, registered
from cdm_plugin.secrets import MASK, is_secret, mask_text

HISTOGRAM = 'train/anchor_sigma_histogram'
GRID = re.compile(r'samples(_\d+_steps)?')
# Logged beside the scalars to say when; and seconds, which training and validation both log.
COUNTERS = ('iter', 'step', 'epoch')
TIMES = ('time', 'data_time')


class NoLogs(ValueError):
    """A folder has no logs, or none yet."""


@dataclass
class Histogram:
    """One histogram: `counts[i]` values between `edges[i]` and `edges[i + 1]`."""
    edges: list[float]
    counts: list[float]


@dataclass
class Run:
    """What a training has logged, by iteration.

    Attributes:
        name (str): Name among the runs that are compared.
        config (dict): Dotted key -> value as it is written in Python.
        scalars (dict): Name -> iteration -> value.
        metrics (set): Names of those scalars that come from validation.
        grids (dict): `samples` or `samples_<n>_steps` -> iteration -> PNG, a file or its bytes.
        histograms (dict): Iteration -> Histogram of the anchors' noise levels since the one before.
        restarts (list): Iterations at which the run was resumed.
    """
    name: str = ''
    config: dict[str, str] = field(default_factory=dict)
    scalars: dict[str, dict[int, float]] = field(default_factory=lambda: defaultdict(dict))
    metrics: set[str] = field(default_factory=set)
    grids: dict[str, dict[int, Path | bytes]] = field(default_factory=lambda: defaultdict(dict))
    histograms: dict[int, Histogram] = field(default_factory=dict)
    restarts: list[int] = field(default_factory=list)

    @property
    def series(self) -> list[dict[int, Any]]:
        """Everything that is logged by iteration."""
        return [*self.scalars.values(), *self.grids.values(), self.histograms]

    @property
    def steps(self) -> list[int]:
        """Iterations with an entry, ascending."""
        return sorted({step for series in self.series for step in series})

    @property
    def student_every(self) -> int | None:
        """Iterations a student step; None of a model that is none of the methods registered."""
        method = registered(self.config.get('model.type', 'None').strip('\'"'), MODELS)
        if not is_type(method, DiffusionModel):
            return None
        value = self.config.get('model.student_every', 'None')
        return int(value) if value.isdigit() else getattr(method, 'default_student_every', 1)


def read_runs(folders: Sequence[str]) -> list[Run]:
    """Reads work directories.

    Args:
        folders (Sequence[str]): Work directories of `cdm train` or any Runner, or their folders of one start.

    Returns:
        list[Run]: In that order. Their names are the ends of the paths that tell them apart.

    Raises:
        FileNotFoundError: If there is no such folder.
        NoLogs: If a folder has no logs.
        ValueError: If a log cannot be read.
    """
    runs = [read_run(folder) for folder in folders]
    for run, name in zip(runs, _short_names(folders)):
        run.name = name
    return runs


def read_run(folder: str) -> Run:
    """Reads one work directory. A resumed run has one log a start: what a start has logged replaces what those before
    it have logged from there on."""
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f'RUN {folder!r} is no folder: give the work_dir of a training')
    # MMEngine names the folder of a start by its time.
    parts = [_read_part(path) for path in sorted([*root.glob('vis_data'), *root.glob('*/vis_data')])]
    run = Run()
    for part in parts:
        _append(run, part)
    if not run.steps:
        raise NoLogs(f'RUN {folder!r} has no logs: expected <time>/vis_data in it, with scalars.json or '
                         'TensorBoard events (visualizer.vis_backends: LocalVisBackend or TensorboardVisBackend)')
    return run


def _append(run: Run, part: Run) -> None:
    if part.config:
        run.config = part.config
    if not part.steps:
        return
    start = part.steps[0]
    run.restarts = [step for step in run.restarts if step < start] + ([start] if run.steps and start > 0 else [])
    for series in run.series:
        for step in [s for s in series if s > start]:
            del series[step]
    pairs: tuple[tuple[Any, Any], ...] = ((run.scalars, part.scalars), (run.grids, part.grids))
    for ours, theirs in pairs:
        for name, series in theirs.items():
            ours[name].update(series)
    run.histograms.update(part.histograms)
    run.metrics |= part.metrics


def _read_part(vis_data: Path) -> Run:
    part = Run()
    events = EventAccumulator(str(vis_data), size_guidance=dict(scalars=0, images=0, histograms=0, tensors=0))
    tags = events.Reload().Tags()
    if (vis_data / 'scalars.json').is_file():
        _read_json_scalars(vis_data / 'scalars.json', part)
    else:
        _read_event_scalars(events, part)
    files = list((vis_data / 'vis_image').glob('*.png'))
    for path in files:
        name, _, step = path.stem.rpartition('_')
        if GRID.fullmatch(name) and step.isdigit():
            part.grids[name][int(step)] = path
    if not files:
        for name in filter(GRID.fullmatch, tags['images']):
            part.grids[name] = {event.step: event.encoded_image_string for event in events.Images(name)}
    if HISTOGRAM in tags['histograms']:
        for event in events.Histograms(HISTOGRAM):
            limits, counts = event.histogram_value.bucket_limit, event.histogram_value.bucket
            # The first bucket is an empty one, whose limit is the second's lower edge.
            part.histograms[event.step] = Histogram(list(limits), list(counts[1:]))
    if (vis_data / 'config.py').is_file():
        part.config = _read_config(vis_data / 'config.py')
    elif 'config/text_summary' in tags['tensors']:
        text = events.Tensors('config/text_summary')[-1].tensor_proto.string_val[0]
        part.config = flat_config(text.decode())
    return part


def _read_json_scalars(path: Path, part: Run) -> None:
    lines = path.read_text(encoding='utf-8').splitlines()
    trained = 0
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
        except ValueError:
            if number == len(lines):  # a killed run may leave half a line
                return
            raise ValueError(f'{path}, line {number}, is no JSON') from None
        validation = 'iter' not in entry  # LoggerHook adds it in training
        # Where LoggerHook.log_metric_by_epoch is on, a validation's step is an epoch.
        trained = max(trained, entry.get('iter', 0))
        step = max(entry.get('step', trained), trained)
        for name, value in entry.items():
            if name in COUNTERS or (validation and name in TIMES) or not isinstance(value, (int, float)):
                continue
            part.scalars[name][step] = float(value)
            if validation:
                part.metrics.add(name)


def _read_event_scalars(events: EventAccumulator, part: Run) -> None:
    names = events.Tags()['scalars']
    trained = {event.step for event in events.Scalars('iter')} if 'iter' in names else None
    for name in names:
        if name in COUNTERS:
            continue
        for event in events.Scalars(name):
            if name not in TIMES:
                part.scalars[name][event.step] = event.value
            elif trained is None or event.step in trained:
                part.scalars[name].setdefault(event.step, event.value)  # training's comes first, then validation's
        if '/' in name and not name.startswith(('train/', 'loss_', 'count/')):  # MMEngine puts a metric's prefix there
            part.metrics.add(name)


def _read_config(path: Path) -> dict[str, str]:
    try:
        return flat_config(path.read_text(encoding='utf-8'))
    except SyntaxError as error:
        raise ValueError(f'{path} is no config: {error}') from None


def flat_config(text: str) -> dict[str, str]:
    """A config as MMEngine dumps it, as dotted key -> value, both as `--cfg-options` takes them.

    It is read, not run: the logs may be somebody else's. Secrets are masked.
    """
    assigned = [(target.id, node.value) for node in ast.parse(text).body if isinstance(node, ast.Assign)
                for target in node.targets if isinstance(target, ast.Name)]
    flat = {key: value for name, node in assigned for key, value in _flatten(name, node)}
    return {key: repr(MASK) if value != 'None' and is_secret(key.split('.')[-1], value) else mask_text(value)
            for key, value in flat.items()}


def _flatten(path: str, node: ast.expr) -> Iterator[tuple[str, str]]:
    children: list[tuple[Any, ast.expr]] = []
    if isinstance(node, ast.Call) and ast.unparse(node.func) == 'dict':  # dict(a=1), or dict({'a b': 1})
        if node.args:
            node = node.args[0]
        else:
            children = [(word.arg, word.value) for word in node.keywords]
    if isinstance(node, ast.Dict) and all(isinstance(key, ast.Constant) for key in node.keys):
        children = [(ast.literal_eval(key), value) for key, value in zip(node.keys, node.values)]
    elif isinstance(node, (ast.List, ast.Tuple)) and any(isinstance(n, (ast.Call, ast.Dict)) for n in node.elts):
        children = list(enumerate(node.elts))
    if not children:
        yield path, ast.unparse(node)
    for key, child in children:
        yield from _flatten(f'{path}.{key}', child)


def config_differences(configs: Sequence[dict[str, str]]) -> dict[str, bool]:
    """Which keys of flat configs differ: dotted key -> whether its values do (a missing one does), sorted by key.

    `work_dir`, which always does, is left out.
    """
    keys = sorted({key for config in configs for key in config} - {'work_dir'})
    return {key: len({config.get(key) for config in configs}) > 1 for key in keys}


def _short_names(folders: Sequence[str]) -> list[str]:
    """The shortest ends of the paths, equally long, that differ; the same path twice keeps its name."""
    parts = [Path(folder).resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ['/'.join(p[-length:]).lstrip('/') for p in parts]
        if len(set(names)) == len(set(parts)):
            break
    return names
