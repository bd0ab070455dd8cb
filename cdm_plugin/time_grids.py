"""Time grids: the noise levels that the backward simulation of one iteration steps through.

A grid is a descending tensor of N noise levels that starts at 1 (pure noise), before the scheduler's shift. Every
level of it can be an anchor.
"""
from collections.abc import Sequence

import torch
from mmengine.registry import TASK_UTILS
from torch import Generator, Tensor

from cdm_plugin.arguments import Count, Share


def check_sigmas(sigmas: Sequence[float], key: str) -> Tensor:
    """Checks a list of noise levels from a config.

    Args:
        sigmas (Sequence[float]): Noise levels, descending, in (0, 1], the first is 1.
        key (str): The config key, named in errors.

    Returns:
        Tensor: (N,) float64.

    Raises:
        ValueError: If the list is empty, leaves (0, 1], is not descending or does not start at 1.
    """
    try:
        values = torch.tensor([float(s) for s in sigmas], dtype=torch.float64)
    except (TypeError, ValueError):
        raise ValueError(f'{key} must be a list of numbers such as [1.0, 0.75, 0.5, 0.25], but is {sigmas!r}') from None
    if len(values) == 0:
        raise ValueError(f'{key} is empty: give at least one noise level, for example [1.0]')
    if not ((values > 0) & (values <= 1)).all():  # so that NaN is refused too
        raise ValueError(f'{key} must lie in (0, 1] (0, the clean end, is implied), but is {list(sigmas)}')
    if (values.diff() >= 0).any():
        raise ValueError(f'{key} must be descending, from noise to clean, but is {list(sigmas)}')
    if values[0] != 1:
        raise ValueError(f'{key} must start at 1.0, pure noise, but starts at {sigmas[0]}')
    return values


@TASK_UTILS.register_module()
class FixedTimeGrid:
    """The same few levels in every iteration, as in DMD2 (arXiv 2405.14867, section 4.4).

    Args:
        sigmas (Sequence[float], optional): Levels before the scheduler's shift, descending from 1. Default: the
            method's `sample_sigmas`, the levels of inference.
    """
    config_key = 'model.time_grid'

    def __init__(self, sigmas: Sequence[float]) -> None:
        self.sigmas = check_sigmas(sigmas, 'model.time_grid.sigmas')

    def sample(self, generator: Generator | None = None) -> Tensor:
        """Returns the levels, (N,) float64."""
        return self.sigmas.clone()


@TASK_UTILS.register_module()
class DynamicTimeGrid:
    """A random grid of random length (arXiv 2605.06376, section 3): N ~ U{min_steps..max_steps}, the first level is
    1, the N - 1 others are U(low, high), sorted descending.

    Args:
        max_steps (int): Largest N. Default 28.
        min_steps (int): Smallest N. Default 1.
        low (float): Lower end of the levels in [0, 1]. Default 0.25.
        high (float): Upper end of the levels in [0, 1]. Default 0.95.
    """
    config_key = 'model.time_grid'

    def __init__(self, max_steps: Count = 28, min_steps: Count = 1, low: Share = 0.25, high: Share = 0.95) -> None:
        if min_steps > max_steps:
            raise ValueError('model.time_grid needs min_steps <= max_steps, '
                             f'but has min_steps={min_steps} and max_steps={max_steps}')
        if not 0 < low <= high:
            raise ValueError(f'model.time_grid needs 0 < low <= high <= 1, but has low={low} and high={high}')
        self.min_steps, self.max_steps, self.low, self.high = min_steps, max_steps, low, high

    def sample(self, generator: Generator | None = None) -> Tensor:
        """Draws one grid, (N,) float64."""
        steps = int(torch.randint(self.min_steps, self.max_steps + 1, (), generator=generator))
        inner = torch.rand(steps - 1, generator=generator, dtype=torch.float64)
        inner = (self.low + (self.high - self.low) * inner).sort(descending=True).values
        return torch.cat([torch.ones(1, dtype=torch.float64), inner])
