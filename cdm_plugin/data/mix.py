"""Several datasets in one run, each with its share of the samples."""
import itertools
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from math import gcd, lcm
from typing import Any

import numpy as np
import torch
from mmengine.dataset import InfiniteSampler
from mmengine.registry import DATA_SAMPLERS, DATASETS
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from cdm_plugin.data.sample import Sample
from cdm_plugin.draws import stream

# Draws after which a schedule begins again, at most: it is held in memory.
LONGEST = 100_000


def quota_schedule(weights: Sequence[int]) -> np.ndarray:
    """Which of k sources each of W = sum(weights) draws comes from; every further W draws repeat them.

    Tijdeman's chairman assignment (Discrete Mathematics 32, 1980): after any n draws, source i has come n w_i / W
    times, give or take 1 - 1 / (2 k - 2) at most; after W draws, just w_i times.

    Args:
        weights (Sequence[int]): Of k sources, each 1 or more.

    Returns:
        np.ndarray: Numbers of sources, (W,).
    """
    total, k = sum(weights), len(weights)
    if k == 1:
        return np.zeros(total, np.int64)
    span, common = 2 * k - 2, lcm(*weights)
    each = [common // weight for weight in weights]
    counts, schedule = [0] * k, np.empty(total, np.int64)
    for n in range(1, total + 1):
        due = [i for i in range(k) if span * (n * weights[i] - counts[i] * total) >= total]
        chosen = min(due, key=lambda i: (span - 1 + span * counts[i]) * each[i])  # that of the earliest deadline
        schedule[n - 1] = chosen
        counts[chosen] += 1
    return schedule


@DATASETS.register_module()
class WeightedMixDataset(Dataset):
    """Samples of several datasets in exact proportions, for `sampler=dict(type='MixSampler')`.

    Draw n of the mix is a function of the seed and n alone. Its source is that of `quota_schedule`: in any window of n
    draws a source with share p comes n p times, give or take less than 2, and from the first draw on less than 1. Each
    source is gone through pass by pass, in an order of its own in each; within a pass nothing comes twice.

    A sample has its source's name in the field `source`; its losses are logged by source.

    Args:
        sources (dict): By name, `dict(dataset=..., weight=...)`: a map-style dataset of any library, its config or
            itself, and how much of it, relative to the others; whole numbers or of few digits. Default weight 1.
        seed (int, optional): Of the sources' orders. Default: the run's.

    Attributes:
        shares (dict): By name, the source's share of the draws, a Fraction.

    Raises:
        ValueError: If a source has no name, no length, no samples or no weight above 0, or the weights have too many
            digits.
    """
    metainfo: dict[str, Any] = {}

    def __init__(self, sources: dict[str, dict[str, Any]], seed: int | None = None) -> None:
        if not sources:
            raise ValueError('WeightedMixDataset.sources is empty: name at least one')
        self.names, self.seed = list(sources), seed
        self.datasets = [self._build(name, source) for name, source in sources.items()]
        weights = self._whole([source.get('weight', 1) for source in sources.values()])
        self.shares = {name: Fraction(weight, sum(weights)) for name, weight in zip(self.names, weights)}
        self._schedule, self._weights = quota_schedule(weights), weights
        # Of each draw of the schedule, how often its source has come before.
        self._before = np.empty_like(self._schedule)
        for i, weight in enumerate(weights):
            self._before[self._schedule == i] = np.arange(weight)
        self._orders: dict[int, tuple[int, Tensor]] = {}

    @staticmethod
    def _build(name: str, source: Any) -> Any:
        where = f'WeightedMixDataset.sources.{name}'
        if not name or '/' in name:
            raise ValueError(f'{where}: a name is a text without a slash')
        if not isinstance(source, Mapping) or 'dataset' not in source or source.keys() - {'dataset', 'weight'}:
            raise ValueError(f'{where} must be dict(dataset=..., weight=...), but is {source!r}')
        dataset = source['dataset']
        dataset = DATASETS.build(dataset) if isinstance(dataset, Mapping) else dataset
        if hasattr(dataset, 'full_init'):
            dataset.full_init()
        if isinstance(dataset, IterableDataset) or not all(hasattr(dataset, n) for n in ('__len__', '__getitem__')):
            raise ValueError(f'{where}.dataset is a {type(dataset).__name__}, which has no length or no samples by '
                             'number: mix datasets, not streams')
        if not len(dataset):
            raise ValueError(f'{where}.dataset is empty: check its ann_file, or leave the source out')
        return dataset

    def _whole(self, weights: list[Any]) -> list[int]:
        """The same proportions in the smallest whole numbers."""
        for name, weight in zip(self.names, weights):
            number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
            if not number or not 0 < weight < float('inf'):
                raise ValueError(f'WeightedMixDataset.sources.{name}.weight must be a number above 0, but is '
                                 f'{weight!r}' + ('; leave the source out' if weight == 0 else ''))
        fractions = [Fraction(str(weight)) for weight in weights]
        scale = lcm(*(fraction.denominator for fraction in fractions))
        whole = [int(fraction * scale) for fraction in fractions]
        whole = [weight // gcd(*whole) for weight in whole]
        if sum(whole) > LONGEST:
            raise ValueError(f'WeightedMixDataset.sources.*.weight: {weights} are proportions that repeat after '
                             f'{sum(whole)} draws, more than {LONGEST}: round them, such as to 0.7 and 0.3')
        return whole

    def full_init(self) -> None:
        """MMEngine's name for loading the dataset, which is done."""

    def locate(self, index: int) -> tuple[int, int]:
        """Number of the source, and of the sample in it, of a draw."""
        if index < 0:
            raise IndexError(f'the draws of a WeightedMixDataset begin with 0, but {index} is asked for')
        cycle, place = divmod(index, len(self._schedule))
        source = int(self._schedule[place])
        turn, row = divmod(cycle * self._weights[source] + int(self._before[place]), len(self.datasets[source]))
        if self._orders.get(source, (None,))[0] != turn:
            generator = stream(self.seed or 0, 'mix', self.names[source], turn)
            self._orders[source] = turn, torch.randperm(len(self.datasets[source]), generator=generator)
        return source, int(self._orders[source][1][row])

    def __len__(self) -> int:
        """Draws of whole schedules in which each sample of each source comes once at least; more may be asked for."""
        return len(self._schedule) * max(-(-len(d) // weight) for d, weight in zip(self.datasets, self._weights))

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int) -> Sample:
        source, row = self.locate(index)
        sample = self.datasets[source][row]
        if not isinstance(sample, Mapping):
            raise ValueError(f'WeightedMixDataset.sources.{self.names[source]}.dataset gives samples that are a '
                             f"{type(sample).__name__}: end its pipeline with dict(type='PackInputs')")
        return Sample(sample, source=self.names[source])

    def get_data_info(self, index: int) -> dict[str, Any]:
        """Raw sample of a draw, as its source has it."""
        source, row = self.locate(index)
        return self.datasets[source].get_data_info(row)


@DATA_SAMPLERS.register_module()
class MixSampler(InfiniteSampler):
    """The draws of a `WeightedMixDataset` in their order, without end, for any number of ranks: all ranks together have
    the next world_size draws, each rank one of them by turns of the seed (so that no rank always has one source).

    Args:
        dataset (WeightedMixDataset): Given by the runner. One without a seed gets the sampler's.
        seed (int, optional): Given by the runner.
    """

    def __init__(self, dataset: WeightedMixDataset, seed: int | None = None) -> None:
        super().__init__(dataset, shuffle=False, seed=seed)
        if dataset.seed is None:
            dataset.seed = self.seed

    def _infinite_indices(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed)
        for start in itertools.count(step=self.world_size):
            yield from (start + torch.randperm(self.world_size, generator=generator)).tolist()
