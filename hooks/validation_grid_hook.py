from typing import Any

import torch
from mmengine.dist import all_gather_object, is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch import Tensor

from cdm_plugin.arguments import Count
from cdm_plugin.sheets import labelled_grid

COLUMNS = 8


@HOOKS.register_module()
class ValidationGridHook(Hook):
    """Draws the first images of every validation, the image `validation` of the visualizer.

    They are what the metrics have judged: of the student with its EMA weights, on the same noise every time.

    Args:
        num_images (int): Images at most. Default 32.
    """
    priority = 'LOW'

    def __init__(self, num_images: Count = 32) -> None:
        self.num_images = num_images
        self._images: list[tuple[int, Tensor]] = []

    def before_val_epoch(self, runner: Any) -> None:
        """Forgets the images of a validation that was broken off."""
        self._images.clear()

    def after_val_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Keeps what belongs in the grid, on the CPU."""
        last = min(self.num_images, len(runner.val_dataloader.dataset))
        self._images += [(sample['index'], sample['image'].detach().float().cpu().clone()) for sample in outputs
                         if sample['index'] < last]

    def after_val_epoch(self, runner: Any, metrics: Any = None) -> None:
        """The grid, of the images of all ranks."""
        images = dict(pair for part in all_gather_object(self._images) for pair in part)
        self._images.clear()
        if is_main_process() and images:
            training = runner._train_loop is not None and not isinstance(runner._train_loop, dict)  # else not built
            runner.visualizer.add_image('validation', labelled_grid(self.rows(images)),
                                        step=runner.iter if training else 0)

    @staticmethod
    def rows(images: dict[int, Tensor]) -> dict[str, Tensor]:
        """The grid's rows, of images by index: 'first index - last index' -> (N, C, H, W)."""
        indices = sorted(images)
        parts = [indices[i:i + COLUMNS] for i in range(0, len(indices), COLUMNS)]
        return {f'{part[0]} - {part[-1]}': torch.stack([images[i] for i in part]) for part in parts}
