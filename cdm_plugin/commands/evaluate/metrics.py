"""Metrics by name or from a config, and what they make of the images on the disk."""
import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.dist import get_rank, get_world_size, is_main_process
from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS

from cdm_plugin.commands.evaluate.entries import Entry
from cdm_plugin.commands.evaluate.generate import Prompt, image_file
from cdm_plugin.config import read_config
from cdm_plugin.data.images import read_image
from cdm_plugin.errors import did_you_mean
from cdm_plugin.metrics import ImageMetric, ScoreMetric
from cdm_plugin.metrics.bootstrap import Interval, bootstrap_mean, jackknife
from cdm_plugin.registry import is_type

# Images that are read before a metric sees them.
READ_AT_ONCE = 64
# Fewer prompts give no interval of a set's value: a tenth of them would be one or two.
MIN_SET = 20


@dataclass
class Scores:
    """What one metric found in one entry's images.

    Attributes:
        values (dict): Name of a result -> Interval; its ends are None where there is no interval.
        images (dict): Name of a score -> scores of the images, (prompts, images a prompt).
        failed (str, optional): Why the metric has no value of these images.
    """
    values: dict[str, Interval] = field(default_factory=dict)
    images: dict[str, np.ndarray] = field(default_factory=dict)
    failed: str | None = None


def build_metrics(names: Sequence[str], entries: Sequence[Entry]) -> list[BaseMetric]:
    """Metrics of the command line.

    Args:
        names (Sequence[str]): Registered names, or configs whose `metrics` or `val_evaluator` says them with their
            arguments. Empty: the `val_evaluator` of the first config among the entries that has one.
        entries (Sequence[Entry]): What is evaluated.

    Raises:
        ValueError: If a name is not registered (with what was probably meant), or there is no metric.
    """
    if not names:
        configs = (read_config(e.source, e.options).get('val_evaluator') for e in entries if not e.is_folder)
        chosen: Iterable[dict[str, Any]] = _as_list(next(filter(None, configs), None))
        if not chosen:
            raise ValueError('--metrics is missing: names of metrics such as '
                             f'{", ".join(registered_metrics()[:4])}, or a config with `metrics` or `val_evaluator`')
    else:
        chosen = (part for name in names for part in _metrics_of(name))  # each built in the scope of its own config
    metrics = [METRICS.build(dict(part)) for part in chosen]
    places = [(metric.prefix, getattr(metric, 'key', type(metric).__name__)) for metric in metrics]
    for metric, place in zip(metrics, places):
        if places.count(place) > 1:
            raise ValueError(f'two metrics would have the name {"/".join(filter(None, place))!r}: give one '
                             f'{type(metric).__name__} another `prefix` in a config')
    return metrics


def registered_metrics() -> list[str]:
    """Names of the registered metrics, those of this package first."""
    found = {name: cls for name, cls in METRICS.module_dict.items()
             if inspect.isclass(cls) and issubclass(cls, BaseMetric) and name != 'DumpResults'}
    return sorted(found, key=lambda name: (not issubclass(found[name], ImageMetric), name))


def _metrics_of(name: str) -> list[dict[str, Any]]:
    if not name.endswith('.py'):
        if name == 'DumpResults' or not is_type(name, BaseMetric, METRICS):
            raise _unknown(name)
        return [dict(type=name)]
    cfg = read_config(name)
    found = _as_list(cfg.get('metrics') or cfg.get('val_evaluator'))
    if not found:
        raise ValueError(f'the config {name!r} has neither `metrics` (a list of dicts) nor `val_evaluator`')
    for part in found:
        if not is_type(part, BaseMetric, METRICS):
            raise _unknown(part.get('type'))
    return found


def _unknown(name: Any) -> ValueError:
    names = registered_metrics()
    return ValueError(f'the metric {name!r} is not registered{did_you_mean(str(name).split(".")[-1], names) or "."} '
                      f'There are {", ".join(names)}, or give a config file')


def _as_list(metrics: None | dict[str, Any] | Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    if metrics is None:
        return []
    return [metrics] if isinstance(metrics, dict) else list(metrics)


def score(metric: BaseMetric, entry: Entry, prompts: Sequence[Prompt], num: int, out: Path, confidence: float,
          resamples: int) -> Scores | None:
    """Judges an entry's images, each rank its share; every rank must call it.

    Args:
        metric (BaseMetric): The metric.
        entry (Entry): Whose images.
        prompts (Sequence): Texts or class labels.
        num (int): Images a prompt.
        out (Path): The evaluation's folder.
        confidence, resamples: Of the intervals, see `bootstrap_mean`.

    Returns:
        Scores: On rank 0; None on the others.
    """
    count = len(prompts) * num
    share = -(-count // get_world_size())
    # As MMEngine's sampler deals them: every rank gets as many, the first ones again where there are too few.
    own = [(get_rank() + get_world_size() * i) % count for i in range(share)]
    for start in range(0, share, READ_AT_ONCE):
        metric.process(None, [
            dict(image=read_image(image_file(out, entry, i), channels=None), prompt=prompts[i // num], index=i // num,
                 draw=i % num) for i in own[start:start + READ_AT_ONCE]])
    values, failed = _evaluate(metric, count)
    if not is_main_process():
        return None
    scores = Scores({name: Interval(float(value), None, None) for name, value in values.items()}, failed=failed)
    if failed is not None:
        return scores
    judged = getattr(metric, 'judged', None)
    if isinstance(metric, ScoreMetric):
        name = _prefixed(metric, metric.key)
        scores.images[name] = judged.rows.numpy().astype(float).reshape(len(prompts), num)
        scores.values[name] = bootstrap_mean(scores.images[name].mean(1), confidence, resamples)
    elif isinstance(metric, ImageMetric) and len(prompts) >= MIN_SET:
        def value(chosen: np.ndarray) -> dict[str, float]:
            images = (chosen[:, None] * num + np.arange(num)).ravel()
            return metric.value(judged.rows[images], [judged.prompts[i] for i in images], judged.index[images])

        intervals = jackknife(value, len(prompts), confidence)
        scores.values.update({_prefixed(metric, name): interval for name, interval in intervals.items()})
    return scores


def _evaluate(metric: BaseMetric, count: int) -> tuple[dict[str, float], str | None]:
    """A metric's values, or, on rank 0, why it has none: hours of the other metrics must not be lost by it."""
    failed: list[str] = []

    def compute_metrics(results: Any, own: Any = metric.compute_metrics) -> dict[str, float]:
        try:
            return own(results)
        except ValueError as error:  # inside, because the other ranks wait for what rank 0 finds
            failed.append(' '.join(str(error).split()))
            return {}

    metric.compute_metrics = compute_metrics
    try:
        return metric.evaluate(count), failed[0] if failed else None
    finally:
        del metric.compute_metrics


def _prefixed(metric: BaseMetric, name: str) -> str:
    return f'{metric.prefix}/{name}' if metric.prefix else name
