"""Compares samplers of digits with the guided teacher."""
import time
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from cdm_plugin.draws import stream
from cdm_plugin.inference import sample_prompts, step_sigmas, student_weights
from cdm_plugin.methods import Distillation
from cdm_plugin.metrics import DigitClassifier, class_accuracy, classifier_features, frechet_distance

NUM_SAMPLES = 1000  # the Fréchet distance depends on the number of samples: compare equal numbers only


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        model (str): 'teacher' (guided) or 'student'.
        steps (int): Sampling steps.
        calls (int): Network calls an image, two a step with guidance.
        fd (float): Fréchet distance to the guided teacher's 50-step samples in the classifier's features.
        accuracy (float): Share of images that the classifier sees as what was asked for, in [0, 1].
        ms_per_image (float): Milliseconds an image on this machine.
    """
    model: str
    steps: int
    calls: int
    fd: float
    accuracy: float
    ms_per_image: float


class Judge:
    """Compares samplers on the same noise and labels with the guided teacher at 50 steps.

    Args:
        method (Distillation): Method with the teacher.
        num_samples (int): Samples of every row.
        reference (Tensor, optional): Features of the reference, (num_samples, 64), from an earlier judge.
    """

    def __init__(self, method: Distillation, num_samples: int, reference: Tensor | None = None) -> None:
        self.method, self.guidance = method, 1 + method.alpha
        self.classifier = DigitClassifier.from_pretrained()
        self.labels = [i % 10 for i in range(num_samples)]
        self.noise = self._noise('demo')
        # The reference has noise of its own, so that the teacher's own row shows the floor of the estimate.
        if reference is None:
            reference = classifier_features(self.sample('teacher', 50, self._noise('reference')), self.classifier)
        self.reference = reference

    def _noise(self, name: str) -> Tensor:
        return torch.randn(self.method.latent_shape(len(self.labels)), generator=stream(name))

    def sample(self, role: str, steps: int, noise: Tensor | None = None) -> Tensor:
        """Images of a role, (N, 1, 16, 16); the teacher is guided, the student is not."""
        scale = self.guidance if role == 'teacher' else 1.0
        return sample_prompts(self.method, self.labels, self.noise if noise is None else noise,
                              sigmas=step_sigmas(steps), role=role, guidance_scale=scale)

    def row(self, role: str, steps: int) -> Row:
        """Samples and scores."""
        start = time.perf_counter()
        images = self.sample(role, steps)
        elapsed = time.perf_counter() - start
        calls = steps * (2 if role == 'teacher' else 1)
        fd = frechet_distance(classifier_features(images, self.classifier), self.reference)
        accuracy = class_accuracy(images, self.labels, self.classifier)
        return Row(role, steps, calls, fd, accuracy, 1000 * elapsed / len(images))

    def picture(self, columns: int = 16) -> dict[str, Tensor]:
        """Rows of the picture, all from the same noise."""
        plan = [('teacher', 50), ('teacher', 4), ('teacher', 2), ('teacher', 1), ('student', 4), ('student', 2),
                ('student', 1)]
        rows = {}
        for role, steps in plan:
            calls = steps * (2 if role == 'teacher' else 1)
            images = sample_prompts(self.method, self.labels[:columns], self.noise[:columns], role=role,
                                    sigmas=step_sigmas(steps), guidance_scale=self.guidance if role == 'teacher' else 1)
            rows[f'{role}, {_count(steps, "step")}, {_count(calls, "call")}'] = images
        return rows


def _count(number: int, word: str) -> str:
    return f'{number} {word}' if number == 1 else f'{number} {word}s'


def judge(method: Distillation, num_samples: int) -> tuple[list[Row], dict[str, Tensor]]:
    """The demo's table and picture, of the EMA student."""
    plan = [('teacher', 50), ('teacher', 8), ('teacher', 4), ('teacher', 2), ('teacher', 1),
            ('student', 8), ('student', 4), ('student', 2), ('student', 1)]
    with student_weights(method, ema=True), tqdm(total=len(plan) + 1, desc='sampling', unit='row') as bar:
        judge_ = Judge(method, num_samples)
        bar.update()
        rows = []
        for role, steps in plan:
            rows.append(judge_.row(role, steps))
            bar.update()
        return rows, judge_.picture()


def format_rows(rows: list[Row]) -> str:
    """The table as aligned text."""
    head = f'{"model":<9}{"steps":>6}{"calls":>7}{"Fréchet distance":>18}{"accuracy":>10}{"ms/image":>10}'
    lines = [f'{r.model:<9}{r.steps:>6}{r.calls:>7}{r.fd:>18.2f}{r.accuracy:>10.3f}{r.ms_per_image:>10.2f}'
             for r in rows]
    return '\n'.join([head, *lines])
