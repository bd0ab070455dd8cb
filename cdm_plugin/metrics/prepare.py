"""Finds out before the first image is made which metrics cannot run."""
import logging
from collections.abc import Sequence
from typing import Any

from mmengine.dist import all_gather_object, get_world_size
from mmengine.evaluator import BaseMetric
from mmengine.logging import print_log

from cdm_plugin.metrics.base import ImageMetric, MissingMetric


def prepare_on_all_ranks(metrics: Sequence[BaseMetric]) -> tuple[list[BaseMetric], dict[str, str]]:
    """Loads what the metrics of this package need; others have nothing to prepare.

    Every rank must call it, and every rank leaves out the same metrics: one that any rank lacks.

    Args:
        metrics (Sequence[BaseMetric]): The metrics.

    Returns:
        tuple: Those that can run, and for the others, by class name, what is missing and how to get it.
    """
    lacking: dict[int, str] = {}
    for i, metric in enumerate(metrics):
        if isinstance(metric, ImageMetric):
            try:
                metric.prepare()
            except MissingMetric as error:
                lacking[i] = str(error)
    for theirs in all_gather_object(lacking):
        lacking = {**theirs, **lacking}
    missing = {type(metrics[i]).__name__: text for i, text in sorted(lacking.items())}
    for name, text in missing.items():
        print_log(f'the metric {name} is left out: {text}', 'current', level=logging.WARNING)
    return [metric for i, metric in enumerate(metrics) if i not in lacking], missing


def check_shares(dataloader: Any, key: str) -> None:
    """Raises ValueError if the ranks get different numbers of samples, with which sharded networks would wait for each
    other forever, and MMEngine would lose results.

    Args:
        dataloader (DataLoader): Of validation or test.
        key (str): Its key in the config.
    """
    if get_world_size() == 1:
        return
    samples = all_gather_object(len(dataloader.sampler))
    if len(set(samples)) > 1:
        raise ValueError(f'every rank needs as many samples of {key}, but they have {samples}: set {key}.sampler='
                         "dict(type='DefaultSampler', shuffle=False, round_up=True)")
