"""How sure a score is: intervals over prompts, and win rates. Pure functions of numbers and a seed."""
import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

Values = Sequence[float] | np.ndarray
# Resamples that are held in memory at once.
CHUNK = 100


class Interval(NamedTuple):
    """An estimate and the ends of its confidence interval."""
    value: float
    low: float
    high: float


def bootstrap_mean(values: Values, confidence: float = 0.95, resamples: int = 2000, seed: int = 0) -> Interval:
    """Percentile bootstrap of a mean (Efron 1979): the prompts are drawn anew with replacement, `resamples` times.

    Equal seeds and numbers of values draw the same prompts, so that two models are compared on the same ones.

    Args:
        values (Sequence[float]): One a prompt, (N,).
        confidence (float): Share of the resampled means inside the interval, in (0, 1). Default 0.95.
        resamples (int): Number of resamples. Default 2000.
        seed (int): Of the draws. Default 0.

    Returns:
        Interval: The mean and the interval.

    Raises:
        ValueError: If there is no value, or one is NaN or infinite, or `confidence` or `resamples` is out of range.
    """
    values = _checked(values, confidence)
    if resamples < 1:
        raise ValueError(f'resamples must be 1 or more, but is {resamples}')
    generator, means = np.random.default_rng(seed), []
    for start in range(0, resamples, CHUNK):
        drawn = generator.integers(len(values), size=(min(CHUNK, resamples - start), len(values)))
        means.append(values[drawn].mean(1))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return Interval(float(values.mean()), float(low), float(high))


def jackknife(statistics: Callable[[np.ndarray], dict[str, float]], count: int, confidence: float = 0.95,
              groups: int = 10, seed: int = 0) -> dict[str, Interval]:
    """Delete-a-group jackknife of any statistics of a set of samples (Shao and Wu 1989), with normal intervals.

    For what the bootstrap cannot resample: a Fréchet distance or a nearest neighbour takes the doubles of a resample
    for a narrower set. Here every set is a part of the samples without doubles.

    Args:
        statistics (Callable): Indices of samples (M,), ascending -> values on these, by name.
        count (int): Number of samples N.
        confidence (float): Of the intervals, in (0, 1). Default 0.95.
        groups (int): Groups, one of which is left out at a time; at most N. Default 10.
        seed (int): Of the split into groups. Default 0.

    Returns:
        dict[str, Interval]: The values of all samples, and the intervals around them.

    Raises:
        ValueError: If there are fewer than 2 samples or groups.
    """
    groups = min(groups, count)
    if groups < 2:
        raise ValueError(f'a jackknife needs 2 samples and groups or more, but has {count} samples, {groups} groups')
    parts = np.array_split(np.random.default_rng(seed).permutation(count), groups)
    without = [statistics(np.setdiff1d(np.arange(count), part)) for part in parts]
    intervals = {}
    for name, value in statistics(np.arange(count)).items():
        left = np.array([values[name] for values in without])
        deviation = math.sqrt((groups - 1) / groups * np.square(left - left.mean()).sum())
        width = NormalDist().inv_cdf((1 + confidence) / 2) * deviation
        intervals[name] = Interval(float(value), float(value - width), float(value + width))
    return intervals


def wins(ours: Values, theirs: Values) -> np.ndarray:
    """Which prompts the first model wins: 1 where its score is higher, 0 where it is lower, 1/2 where they are equal.

    Args:
        ours (Sequence[float]): Scores of the first model, one a prompt, (N,).
        theirs (Sequence[float]): Scores of the second on the same prompts, (N,).

    Returns:
        ndarray: (N,), float64. Its mean is the win rate.
    """
    ours, theirs = np.asarray(ours, dtype=float), np.asarray(theirs, dtype=float)
    if ours.shape != theirs.shape:
        raise ValueError(f'a win rate needs scores of the same prompts, but has {ours.shape} and {theirs.shape} scores')
    return (1 + np.sign(ours - theirs)) / 2


def _checked(values: Values, confidence: float) -> np.ndarray:
    values = np.asarray(values, dtype=float)
    if values.ndim != 1 or len(values) == 0 or not np.isfinite(values).all():
        raise ValueError(f'an interval needs finite values, one a prompt, but has {values.shape} of them, '
                         f'{int((~np.isfinite(values)).sum())} NaN or infinite')
    if not 0 < confidence < 1:
        raise ValueError(f'confidence must lie in (0, 1), but is {confidence}')
    return values
