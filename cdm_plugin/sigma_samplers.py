"""Sigma samplers: the laws from which losses draw the noise levels of their questions, one level a sample.

Each is called with the generator, the anchors' levels and a function that draws one (shifted) time grid; it uses
what its law depends on.
"""
from collections.abc import Callable

import torch
from mmengine.registry import TASK_UTILS
from torch import Generator, Tensor

from cdm_plugin.arguments import Positive, Share

DrawGrid = Callable[[Generator], Tensor]


class SigmaSampler:
    """Base class: clamps every draw to [low, high].

    Args:
        low (float): Smallest noise level. Default 0.02.
        high (float): Largest noise level. Default 0.98.
    """

    def __init__(self, low: Share = 0.02, high: Share = 0.98) -> None:
        if low >= high:
            raise ValueError(f'{type(self).__name__} needs 0 <= low < high <= 1, but has low={low} and high={high}')
        self.low, self.high = low, high

    def __call__(self, generator: Generator, anchor_sigma: Tensor, draw_grid: DrawGrid) -> Tensor:
        """Draws one level a sample.

        Args:
            generator (Generator): CPU generator.
            anchor_sigma (Tensor): Noise levels of the anchors after the scheduler's shift, (B,).
            draw_grid (Callable): Draws another time grid, (N,), after the scheduler's shift.

        Returns:
            Tensor: (B,) float64 in [low, high].
        """
        return self.law(generator, anchor_sigma, draw_grid).clamp(self.low, self.high)

    def law(self, generator: Generator, anchor_sigma: Tensor, draw_grid: DrawGrid) -> Tensor:
        """The draw before the clamp, (B,) float64."""
        raise NotImplementedError


@TASK_UTILS.register_module()
class UniformSigma(SigmaSampler):
    """sigma ~ U(0, 1)."""

    def law(self, generator: Generator, anchor_sigma: Tensor, draw_grid: DrawGrid) -> Tensor:
        return torch.rand(len(anchor_sigma), generator=generator, dtype=torch.float64)


@TASK_UTILS.register_module()
class CappedUniformSigma(SigmaSampler):
    """sigma ~ U(0, sigma_n): never noisier than the sample's own anchor. The published law of CA (arXiv 2511.22677,
    section 4.1)."""

    def law(self, generator: Generator, anchor_sigma: Tensor, draw_grid: DrawGrid) -> Tensor:
        return anchor_sigma.double() * torch.rand(len(anchor_sigma), generator=generator, dtype=torch.float64)


@TASK_UTILS.register_module()
class LogitNormalSigma(SigmaSampler):
    """sigma = sigmoid(mean + std z), z ~ N(0, 1), as SD3 was trained (Esser et al. 2024, section 3.1).

    Args:
        mean (float): Mean of logit(sigma). Default 0.
        std (float): Standard deviation of logit(sigma), above 0. Default 1.
        low (float): Smallest noise level. Default 0.02.
        high (float): Largest noise level. Default 0.98.
    """

    def __init__(self, mean: float = 0.0, std: Positive = 1.0, low: Share = 0.02, high: Share = 0.98) -> None:
        super().__init__(low, high)
        self.mean, self.std = mean, std

    def law(self, generator: Generator, anchor_sigma: Tensor, draw_grid: DrawGrid) -> Tensor:
        z = torch.randn(len(anchor_sigma), generator=generator, dtype=torch.float64)
        return torch.sigmoid(self.mean + self.std * z)


@TASK_UTILS.register_module()
class AnchorSigma(SigmaSampler):
    """The anchors' own law: an independent grid and a uniform index on it, for every sample.

    With it the CDM loss asks an anchor-aware fake score only where the fake score was trained. The clamp is off by
    default (an anchor may sit at pure noise, sigma = 1).
    """

    def __init__(self, low: Share = 0.0, high: Share = 1.0) -> None:
        super().__init__(low, high)

    def law(self, generator: Generator, anchor_sigma: Tensor, draw_grid: DrawGrid) -> Tensor:
        grids = [draw_grid(generator) for _ in range(len(anchor_sigma))]
        return torch.stack([g[torch.randint(len(g), (), generator=generator)] for g in grids]).double()
