from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch import Tensor
from torch.utils.data import IterableDataset

from cdm_plugin.arguments import Count
from cdm_plugin.condition import Condition
from cdm_plugin.data import Stream
from cdm_plugin.draws import randomness_kept, stream
from cdm_plugin.hooks.method import method_of
from cdm_plugin.hooks.signal_hook import asked_to_stop
from cdm_plugin.inference import step_sigmas
from cdm_plugin.methods import DiffusionModel
from cdm_plugin.sheets import labelled_grid

LABELS = dict(fake='fake score')


@HOOKS.register_module()
class SampleGridHook(Hook):
    """Draws what every role makes of the same noise: student, its EMA, teacher and fake score, one row each. (A trained
    role whose network is of another kind than the student's, such as a discriminator, makes no images.)

    A run that collapses shows it here first; the losses may look healthy. Every rank draws, because a sharded network
    needs them all, and the first one writes. A run that is asked to stop draws no further row and leaves the grid out.

    The grid is the image `samples`. Each of `steps` has a grid beside it, `samples_<n>_steps`: student, EMA and guided
    teacher with that many steps, and the teacher with all of its own. `cdm compare` shows them side by side.

    Args:
        interval (int): Iterations between two grids; there is one before the first iteration too. Default 200.
        num_images (int): Images a row. Default 8.
        prompts (list, optional): Texts or class labels, `num_images` of them. Default: of the dataset's first samples.
        guidance_scale (float, optional): Of the teacher. Default: 1 + model.alpha.
        teacher_steps (int): Steps of the teacher and the fake score. Default 28.
        seed (int): Of the noise. Default 0.
        steps (Sequence[int]): Numbers of steps of further grids, on the usual levels 1, 1 - 1/n, ..., 1/n before the
            scheduler's shift. Default: none.
    """
    priority = 'LOW'

    def __init__(self, interval: Count = 200, num_images: Count = 8, prompts: list | None = None,
                 guidance_scale: float | None = None, teacher_steps: Count = 28, seed: int = 0,
                 steps: Sequence[Count] = ()) -> None:
        self.interval, self.num_images, self.prompts = interval, num_images, prompts
        self.guidance_scale, self.teacher_steps, self.seed = guidance_scale, teacher_steps, seed
        self.steps = tuple(steps)
        self._condition: Condition | None = None
        self._teacher_rows: dict[int, Tensor] = {}
        # The last grid, for hooks that judge it: when it was drawn, and its rows.
        self.drawn: tuple[int, dict[str, Tensor]] | None = None

    def before_train(self, runner: Any) -> None:
        """The grid before the first iteration."""
        self._draw(runner, runner.iter)

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """A grid every `interval` iterations."""
        if self.every_n_train_iters(runner, self.interval):
            self._draw(runner, runner.iter + 1)

    def _draw(self, runner: Any, step: int) -> None:
        grids: dict[str, dict[str, Tensor]] = {}
        for name, steps in {'samples': None, **{f'samples_{n}_steps': n for n in self.steps}}.items():
            grids[name] = {}
            for label, images in self._rows(runner, steps):
                if asked_to_stop(runner):
                    return
                grids[name][label] = images
        self.drawn = step, grids['samples']
        if is_main_process():
            for name, rows in grids.items():
                runner.visualizer.add_image(name, labelled_grid(rows), step=step)

    def rows(self, runner: Any, steps: int | None = None) -> dict[str, Tensor]:
        """A grid's rows: name -> images in [-1, 1], (N, C, H, W).

        Args:
            runner (Runner): The runner.
            steps (int, optional): Of student and EMA, and of a teacher row in place of the other trained roles'.
                Default: the levels of `model.sample_sigmas`, with their rows.
        """
        return dict(self._rows(runner, steps))

    @torch.no_grad()
    def _rows(self, runner: Any, steps: int | None) -> Iterator[tuple[str, Tensor]]:
        method = method_of(runner)
        condition = self._get_condition(runner, method)
        noise = torch.randn(method.latent_shape(len(condition)), generator=stream(self.seed, 'sample_grid'))
        few = method.sample_sigmas if steps is None else step_sigmas(steps)
        label = '1 step' if len(few) == 1 else f'{len(few)} steps'
        yield f'student, {label}', method.sample(condition, noise, few)
        if method.student_ema is not None:
            with method.student_ema.applied():
                images = method.sample(condition, noise, few)
            yield f'EMA, {label}', images
        if not hasattr(method, 'teacher'):
            return
        if steps is not None:
            yield f'teacher, {label}', self._teacher_row(method, condition, noise, steps)
        yield f'teacher, {self.teacher_steps} steps', self._teacher_row(method, condition, noise, self.teacher_steps)
        scores = [r for r in method.trained_roles if r in method.denoisers and r != method.main_role]
        for role in scores if steps is None else ():
            yield f'{LABELS.get(role, role)}, {self.teacher_steps} steps', method.sample(
                condition, noise, step_sigmas(self.teacher_steps), role, anchor_sigma=float(method.shift(few)[-1]))

    def _teacher_row(self, method: DiffusionModel, condition: Condition, noise: Tensor, steps: int) -> Tensor:
        if steps not in self._teacher_rows:  # the teacher is frozen
            guidance = 1 + method.alpha if self.guidance_scale is None else self.guidance_scale
            self._teacher_rows[steps] = method.sample(condition, noise, step_sigmas(steps), 'teacher', guidance)
        return self._teacher_rows[steps]

    def _get_condition(self, runner: Any, method: DiffusionModel) -> Condition:
        if self._condition is None:
            if self.prompts is not None:
                samples = [dict(prompt=p) for p in self.prompts[:self.num_images]]
            else:
                dataset = runner.train_dataloader.dataset
                if isinstance(dataset, IterableDataset) and not isinstance(dataset, Stream):
                    raise ValueError('SampleGridHook.prompts is needed with an iterable dataset: a list of texts or '
                                     'class labels')
                with randomness_kept():  # of captions that are drawn, and crops
                    samples = list(islice(dataset.once(), self.num_images)) if isinstance(dataset, Stream) else [
                        dataset[i] for i in range(min(self.num_images, len(dataset)))]
            self._condition = method.backbone.condition(method.data_preprocessor(samples, False)).to(method.device)
        return self._condition
