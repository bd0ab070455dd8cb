"""What all metrics of generated images share: judges that load lazily, batches, ranks and resumes merged by prompt."""
import contextlib
import dataclasses
import logging
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import HFValidationError
from mmengine.device import get_device
from mmengine.dist import get_world_size
from mmengine.evaluator import BaseMetric
from mmengine.logging import print_log
from torch import Tensor

from cdm_plugin.arguments import Count

# Packages whose own requirements would replace this environment's, or are not needed for what is used of them.
INSTALL = {'hpsv3': 'pip install --no-deps hpsv3', 'torch_fidelity': 'pip install --no-deps torch-fidelity'}


class MissingMetric(Exception):
    """A metric cannot run here. One line: which package or weights it lacks, how to get them, and the config key."""


@dataclasses.dataclass(frozen=True)
class Judged:
    """What a metric found in all images, one row an image, in the order of (index, draw).

    Attributes:
        rows (Tensor): float32 on the CPU: scores (N,) of a `ScoreMetric`, features (N, D) of a `SetMetric`.
        prompts (list): The N prompts.
        index (Tensor): int64 (N,), the position of each image's prompt in the prompt file.
        draw (Tensor): int64 (N,), the how-manieth image of its prompt each is, from 0.
    """

    rows: Tensor
    prompts: list
    index: Tensor
    draw: Tensor


class ImageMetric(BaseMetric):
    """Judges generated images, one row an image.

    Each data sample is a dict with

    - `image`, a tensor (C, H, W) in [-1, 1], C is 3 or 1; what overshoots is clamped, as when a picture is saved;
    - `prompt`, a str, or a label where the metric says so;
    - `index` (int), the position of the prompt. Images may come in any order, from any rank, and twice (a sampler's
      padding, a resumed run): of equal (`index`, `draw`) one counts. Without `index` the samples are taken in
      MMEngine's order of ranks, and cut to the length of the data set;
    - `draw` (int, optional), which of several images of one prompt this is. Default 0.

    `evaluate` leaves what it judged in `judged`, on rank 0.

    Args:
        device (str, optional): Where the judge runs, such as 'cuda:1' or 'cpu'. Default None: this process's
            accelerator, or the CPU where there is none.
        batch_size (int): Images in one forward pass. Default 16.
        **kwargs: `collect_device`, `prefix` and `collect_dir` of MMEngine's `BaseMetric`.
    """

    default_prefix = 'images'
    key: str
    """Name of the main result, without the prefix."""
    higher_is_better = True
    results: list[Any]
    differentiable = False
    """Whether `reward` passes gradients to the images."""

    def __init__(self, device: str | None = None, batch_size: Count = 16, **kwargs) -> None:
        super().__init__(**kwargs)
        self.device = torch.device(get_device() if device is None else device)
        self.batch_size = batch_size
        self.judged: Judged | None = None
        self._ready = False
        self._size = 0

    @property
    def name(self) -> str:
        """The class as configs name it."""
        return type(self).__name__

    def prepare(self) -> None:
        """Loads the judge; does nothing if it is there. Call it before any image is made.

        Raises:
            MissingMetric: A package or weights are missing.
        """
        if not self._ready:
            self.load()
            self._ready = True

    def release(self) -> None:
        """Drops the judge, so that the next one has the memory; `prepare` loads it again."""
        self.unload()
        self._ready = False

    def load(self) -> None:
        """Loads packages and weights onto `device`, inside `self.needs(...)`."""

    def unload(self) -> None:
        """Drops what `load` loaded."""

    @abstractmethod
    def judge(self, images: Tensor, prompts: list) -> Tensor:
        """Returns one row an image, (B,) or (B, D), for images (B, C, H, W) in [-1, 1] on `device`."""

    @abstractmethod
    def value(self, rows: Tensor, prompts: list, index: Tensor) -> dict[str, float]:
        """The results of a set of rows: of all of them, or of a bootstrap's draw.

        A bootstrap that draws a prompt twice gives the two copies two indices: they are two prompts then.

        Args:
            rows (Tensor): (N,) or (N, D), as from `judge`.
            prompts (list): The N prompts.
            index (Tensor): int64 (N,); images of one prompt share it.
        """

    def reward(self, images: Tensor, prompts: list) -> Tensor:
        """What a `differentiable` metric wants more of, (B,), with gradient; arguments as of `judge`."""
        raise NotImplementedError

    def least_images(self) -> int:
        """Below this number of images the value says little: with as few as a Fréchet distance has features, their
        covariance is singular. Default 0."""
        return 0

    def rows(self, images: Sequence[Tensor] | Tensor, prompts: Sequence) -> Tensor:
        """Judges images in batches.

        Args:
            images (Sequence[Tensor] | Tensor): N images (C, H, W) in [-1, 1]; their sizes may differ.
            prompts (Sequence): N prompts.

        Returns:
            Tensor: float32 on the CPU, (N,) or (N, D).

        Raises:
            MissingMetric: As `prepare`.
            ValueError: An image has another shape or holds NaN or infinity, or there are not as many prompts.
        """
        if not len(images) == len(prompts) > 0:
            raise ValueError(f'{self.name} needs one prompt an image, got {len(images)} images, {len(prompts)} prompts')
        self._check(images)
        self.prepare()
        return self.judge_all(images, prompts)

    @torch.no_grad()
    def judge_all(self, images: Sequence[Tensor] | Tensor, prompts: Sequence) -> Tensor:
        """`judge` in batches, of a judge that is loaded and images that are checked; as `rows`."""
        chunks = []
        for start, stop in _chunks([tuple(image.shape) for image in images], self.batch_size):
            batch = torch.stack([image.to(self.device).float().clamp(-1, 1) for image in images[start:stop]])
            rows = self.judge(batch, list(prompts[start:stop])).float().cpu()
            if len(rows) != len(batch):
                raise ValueError(f'{self.name}.judge must return a row an image, got {len(rows)} for {len(batch)}')
            chunks.append(rows)
        return torch.cat(chunks)

    def process(self, data_batch: object, data_samples: Sequence[dict]) -> None:
        """Judges each predicted sample and keeps its row."""
        if not data_samples:
            return
        prompts = [_plain(sample['prompt']) for sample in data_samples]
        # rows as arrays: a row of a tensor would drag its whole batch along when ranks exchange results
        rows = self.rows([sample['image'] for sample in data_samples], prompts).numpy()
        for row, prompt, sample in zip(rows, prompts, data_samples):
            index = sample.get('index')
            self.results.append((None if index is None else int(index), int(sample.get('draw', 0)), prompt, row))

    def evaluate(self, size: int) -> dict[str, float]:
        """Merges the ranks and returns the results, the same on each.

        Args:
            size (int): Length of the data set; samples without `index` are cut to it.
        """
        # One item a rank: MMEngine interleaves the items of ranks and stops at the shortest, which would lose images
        # where ranks have not judged equally many.
        self._size, self.results = size, [self.results]
        return super().evaluate(get_world_size())

    def compute_metrics(self, results: list) -> dict[str, float]:
        """Keeps the merged rows in `judged` and returns their `value`.

        Raises:
            ValueError: There are no images, or only some samples have an `index`.
        """
        merged = _merged(results, self._size, self.name)
        if not merged:
            raise ValueError(f'{self.name} got no samples: is the val_dataloader empty?')
        if len(merged) < self.least_images():
            print_log(f'{self.name} of {len(merged)} images says little, and may order models wrongly: it needs '
                      f'{self.least_images()} or more', 'current', level=logging.WARNING)
        index, draw, prompts, rows = zip(*merged)
        self.judged = Judged(torch.from_numpy(np.stack(rows)), list(prompts), torch.tensor(index), torch.tensor(draw))
        return self.value(self.judged.rows, self.judged.prompts, self.judged.index)

    @contextlib.contextmanager
    def needs(self, pretrained: str, key: str = 'pretrained', get: str | None = None) -> Iterator[None]:
        """Turns what loading raises when something is not there into a `MissingMetric`.

        Args:
            pretrained (str): The hub id, the path or the URL that is being loaded.
            key (str): The metric's argument that names it.
            get (str, optional): The command that gets it. Default None: `hf download` of a hub id.
        """
        try:
            yield
        except ImportError as error:
            package = (error.name or str(error)).split('.')[0]
            install = INSTALL.get(package, f'pip install {package}')
            raise MissingMetric(f'{self.name} needs the package {package}: {install}') from error
        except (OSError, HFValidationError) as error:  # absent files, unreachable hubs, paths taken for hub ids
            get = get or f'hf download {pretrained}'
            raise MissingMetric(f'{self.name} has no weights at {pretrained!r}: run `{get}` where there is a network, '
                                f'or set `{key}` of {self.name} to where they lie') from error

    def _check(self, images: Sequence[Tensor] | Tensor) -> None:
        bad = 0
        for image in images:
            if image.ndim != 3 or image.shape[0] not in (1, 3):
                raise ValueError(f'{self.name} expects images of shape (3 or 1, H, W), got {tuple(image.shape)}')
            bad += not bool(image.isfinite().all())
        if bad:
            raise ValueError(f'{bad} of {len(images)} images hold NaN or infinity: the generator has diverged')


class ScoreMetric(ImageMetric):
    """A score of each image; the result is their mean, under `key`. Higher is better.

    The images' own scores are `judged.rows` (N,) after `evaluate`: what win rates and intervals are made of.
    """

    @abstractmethod
    def scores(self, images: Tensor, prompts: list) -> Tensor:
        """Returns a score (B,) of each image, for images (B, C, H, W) in [-1, 1] on `device`."""

    def judge(self, images: Tensor, prompts: list) -> Tensor:
        return self.scores(images, prompts)

    def reward(self, images: Tensor, prompts: list) -> Tensor:
        return self.scores(images, prompts)

    def texts(self, prompts: list) -> list[str]:
        """The prompts of a judge that reads text.

        Raises:
            ValueError: A prompt is no str.
        """
        wrong = next((prompt for prompt in prompts if not isinstance(prompt, str)), None)
        if wrong is not None:
            raise ValueError(f'{self.name} reads prompts, which must be text, got {wrong!r}: take {self.name} out of '
                             'the metrics of this model')
        return prompts

    def value(self, rows: Tensor, prompts: list, index: Tensor) -> dict[str, float]:
        return {self.key: rows.double().mean().item()}


class SetMetric(ImageMetric):
    """A value of the whole set, from features (N, D) of its images; rows can be drawn again for a bootstrap."""

    @abstractmethod
    def features(self, images: Tensor) -> Tensor:
        """Returns features (B, D) of images (B, C, H, W) in [-1, 1] on `device`."""

    def judge(self, images: Tensor, prompts: list) -> Tensor:
        return self.features(images)


def _merged(parts: list[list], size: int, name: str) -> list[tuple]:
    """One list of (index, draw, prompt, row) from a list a rank."""
    without = sum(item[0] is None for part in parts for item in part)
    if without not in (0, sum(map(len, parts))):
        raise ValueError(f'{name}: {without} of {sum(map(len, parts))} samples have no `index`: give it to all or none')
    if without:  # as MMEngine's samplers deal them: the first of each rank, then the second ...
        longest = max(map(len, parts))
        dealt = [part[i] for i in range(longest) for part in parts if i < len(part)][:size]
        return [(position, *item[1:]) for position, item in enumerate(dealt)]
    first: dict[Any, Any] = {}
    for part in parts:
        for item in part:
            first.setdefault(item[:2], item)
    return [first[key] for key in sorted(first)]


def _chunks(shapes: list[tuple], batch_size: int) -> Iterator[tuple[int, int]]:
    """Ranges of neighbours with one shape, at most `batch_size` long."""
    start = 0
    for stop in range(1, len(shapes) + 1):
        if stop == len(shapes) or stop - start == batch_size or shapes[stop] != shapes[start]:
            yield start, stop
            start = stop


def _plain(prompt: object) -> object:
    """A label in a tensor or an array as a number, which ranks exchange without the tensor's batch."""
    return prompt.item() if isinstance(prompt, (Tensor, np.generic, np.ndarray)) else prompt
