import logging
import math
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.registry import HOOKS
from torch import Tensor

from cdm_plugin.hooks.method import method_of
from cdm_plugin.hooks.sample_grid_hook import SampleGridHook

# Iterations of which a scalar's mean is judged.
WINDOW = 50
# Thresholds. On the digits sound recipes stay far from each of them: docs/symptoms.md has the figures.
CLAMPED, OPPOSED, RUNAWAY, FADED, GLARING, SATURATED = 0.9, -0.9, 2.0, 0.8, 1.5, 0.3


@HOOKS.register_module()
class CollapseWatchHook(Hook):
    """Warns of collapses that are known, and says where to read on (docs/symptoms.md). It changes nothing.

    It reads the scalars once in 50 iterations, and the grids that a SampleGridHook has drawn: without one the images
    are not watched, and these show a collapse first.
    """

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self._scalars: list[dict[str, Any]] = []
        self._lowest: dict[str, float] = {}
        self._best_contrast = 0.0
        self._grid_seen: int | None = None
        self._raised: set[str] = set()

    def before_train(self, runner: Any) -> None:
        """Forgets an earlier training."""
        self._forget()

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Keeps the scalars, on their device, and looks at what is new."""
        names = ('loss_', 'clamp_', 'cosine_ca_dm')
        self._scalars.append({key: value for key, value in (outputs or {}).items() if key.startswith(names)})
        if self.every_n_train_iters(runner, WINDOW):
            method = method_of(runner)
            scores = {f'loss_{role}' for role in method.denoisers if role != method.main_role}
            self.judge_scalars(runner.iter + 1, self._means(method.device), scores)
            self._scalars.clear()
        self._look_at_grids(runner)

    def after_train(self, runner: Any) -> None:
        """Looks at the last grid, which is drawn after the last iteration's other hooks."""
        self._look_at_grids(runner)

    def _means(self, device: torch.device) -> dict[str, float]:
        """Mean of every scalar over the iterations that have it; all reach the host in one copy."""
        values: dict[str, list[Tensor]] = {}
        for scalars in self._scalars:
            for key, value in scalars.items():
                values.setdefault(key, []).append(torch.as_tensor(value).detach().to(device, torch.float32).reshape(()))
        means = torch.stack([torch.stack(own).nanmean() for own in values.values()]).tolist() if values else []
        return {key: mean for key, mean in zip(values, means) if not math.isnan(mean)}

    def judge_scalars(self, iteration: int, means: dict[str, float], score_losses: set[str]) -> None:
        """Judges the means of a window.

        Args:
            iteration (int): Its last iteration.
            means (dict): Scalars by name.
            score_losses (set): Names of the losses of fake scores.
        """
        for key, mean in means.items():
            if key.startswith('clamp_'):
                self._say(key, mean > CLAMPED, iteration, f'{key} is {mean:.2f}: most normalisers are clamped, and the '
                          f'loss has lost its scale; look at model.losses.{key.removeprefix("clamp_")}.min_norm')
            elif key in score_losses:
                lowest = self._lowest[key] = min(mean, self._lowest.get(key, mean))
                self._say(key, mean > RUNAWAY * lowest, iteration, f'{key} has grown from {lowest:.3g} to {mean:.3g}: '
                          'the fake score does not follow the student; look at its learning rate and model.fake_steps')
        cosine = means.get('cosine_ca_dm', 0.0)
        self._say('cosine', cosine < OPPOSED, iteration, f'cosine_ca_dm is {cosine:.2f}: CA and DM cancel each other; '
                  'look at model.alpha and at the samples')

    def _look_at_grids(self, runner: Any) -> None:
        for hook in runner.hooks:
            if isinstance(hook, SampleGridHook) and hook.drawn is not None and hook.drawn[0] != self._grid_seen:
                self._grid_seen, rows = hook.drawn
                self.judge_images(self._grid_seen, rows)

    def judge_images(self, iteration: int, rows: dict[str, Tensor]) -> None:
        """Judges a grid: the average's images (the student's own without one) beside the teacher's.

        Args:
            iteration (int): When it was drawn.
            rows (dict): Images in [-1, 1] by the rows' names, (N, C, H, W).
        """
        own = next((rows[name] for start in ('EMA', 'student') for name in rows if name.startswith(start)), None)
        teacher = next((rows[name] for name in rows if name.startswith('teacher')), None)
        if own is None or teacher is None:
            return
        ratio = contrast(own) / max(contrast(teacher), 1e-6)
        self._best_contrast = max(ratio, self._best_contrast)
        self._say('contrast', ratio < FADED and ratio < FADED * self._best_contrast, iteration,
                  f"the samples have {ratio:.2f} of the teacher's contrast, after {self._best_contrast:.2f}: they "
                  'fade; look at guidance that is missing at some predictions (docs/recipes.md)')
        self._say('glare', ratio > GLARING, iteration, f"the samples have {ratio:.2f} of the teacher's contrast; look "
                  'at model.alpha, and at model.losses.ca.sigma')
        share, theirs = saturation(own), saturation(teacher)
        self._say('saturation', share > theirs + SATURATED, iteration, f'{share:.0%} of the samples\' values are black '
                  f"or white, {theirs:.0%} of the teacher's; look at model.alpha")

    def _say(self, kind: str, found: bool, iteration: int, text: str) -> None:
        """A warning where something begins, not as long as it lasts."""
        if found and kind not in self._raised:
            print_log(f'iteration {iteration}: {text}; docs/symptoms.md', 'current', level=logging.WARNING)
        (self._raised.add if found else self._raised.discard)(kind)


def contrast(images: Tensor) -> float:
    """Standard deviation of an image's values, mean over the images (N, C, H, W)."""
    return float(images.float().flatten(1).std(1).mean())


def saturation(images: Tensor) -> float:
    """Share of values at either end of [-1, 1]."""
    return float((images.abs() >= 0.999).float().mean())
