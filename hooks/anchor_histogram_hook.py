from typing import Any

import numpy as np
import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.visualization import LocalVisBackend
from torch import Tensor

from cdm_plugin.arguments import Count
from cdm_plugin.hooks.method import method_of
from cdm_plugin.sheets import bars

# TensorBoard's own bins grow by a tenth each: all of [0.91, 1] would be one.
EDGES = torch.linspace(0, 1, 51, dtype=torch.float64).tolist()


@HOOKS.register_module()
class AnchorHistogramHook(Hook):
    """Draws the anchors' noise levels in TensorBoard, those of the first rank; for another backend than files, as the
    picture `anchor_sigma_histogram`, from sigma 0 at the left to 1.

    Args:
        interval (int): Iterations of a histogram. Default 100.
    """

    def __init__(self, interval: Count = 100) -> None:
        self.interval = interval
        self._sigmas: list[Tensor] = []

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Collects the levels, on their device, and draws them when they are enough."""
        sigma = method_of(runner).anchor_sigma
        if sigma is not None:
            self._sigmas.append(sigma)
        if self._sigmas and self.every_n_train_iters(runner, self.interval):
            if is_main_process():
                self._draw(runner, torch.cat(self._sigmas).float().cpu())
            self._sigmas.clear()

    @staticmethod
    def _draw(runner: Any, sigmas: Tensor) -> None:
        for backend in runner.visualizer._vis_backends.values():
            if hasattr(backend.experiment, 'add_histogram'):
                backend.experiment.add_histogram('train/anchor_sigma_histogram', sigmas, runner.iter + 1, bins=EDGES)
            elif not isinstance(backend, LocalVisBackend):
                backend.add_image('anchor_sigma_histogram', bars(np.histogram(sigmas, EDGES)[0]), runner.iter + 1)
