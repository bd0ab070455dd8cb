"""How many generated digits are the digit that was asked for, and how far they lie from a reference set."""
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from mmengine.registry import METRICS
from torch import Tensor

from cdm_plugin import assets
from cdm_plugin.metrics.base import SetMetric
from cdm_plugin.metrics.digit_classifier import NUM_CLASSES, NUM_FEATURES, PRETRAINED, DigitClassifier, pixels_to_images
from cdm_plugin.metrics.frechet import frechet_distance


@torch.no_grad()
def classifier_features(images: Tensor, classifier: DigitClassifier, batch_size: int = 500) -> Tensor:
    """Features of the classifier's penultimate layer, for `frechet_distance`.

    Args:
        images (Tensor): (N, 1, 16, 16) in [-1, 1], on any device and of any float type. What overshoots is clamped,
            as it is when a picture is saved.
        classifier (DigitClassifier): The judge; images are moved to its device.
        batch_size (int): Images in one forward pass. Default 500.

    Returns:
        Tensor: float32 (N, 64), on the CPU.

    Raises:
        ValueError: `images` has another shape, or holds NaN or infinity.
    """
    if tuple(images.shape[1:]) != (1, 16, 16):
        raise ValueError(f'expected images of shape (N, 1, 16, 16), got {tuple(images.shape)}')
    bad = (~images.isfinite()).flatten(1).any(dim=1).sum().item()
    if bad:
        raise ValueError(f'{bad} of {len(images)} images hold NaN or infinity: the generator has diverged')
    device = next(classifier.parameters()).device
    batches = images.float().clamp(-1, 1).split(batch_size)
    return torch.cat([classifier.features(batch.to(device)).cpu() for batch in batches])


def class_accuracy(images: Tensor, labels: Tensor | Sequence[int], classifier: DigitClassifier) -> float:
    """Share of images, in [0, 1], that the classifier takes for their label.

    Args:
        images (Tensor): (N, 1, 16, 16) in [-1, 1], as for `classifier_features`. N >= 1.
        labels (Tensor | Sequence[int]): (N,), the digits asked for.
        classifier (DigitClassifier): The judge.

    Raises:
        ValueError: There are no images, not as many labels as images, a label outside 0..9, or what
            `classifier_features` refuses.
    """
    return _accuracy(classifier_features(images, classifier), labels, classifier)


@METRICS.register_module()
class DigitMetric(SetMetric):
    """Judges generated digits with a classifier.

    Each predicted sample is that of `ImageMetric`, with `image` (1, 16, 16) and `prompt` the digit asked for (int).
    The metrics are `accuracy`, the share in [0, 1] of images classified as their prompt, and, where there is a
    reference, `fd`, the Fréchet distance to it in the classifier's 64 features (smaller is better; it falls with the
    number of samples, so compare only equal numbers).

    Args:
        reference (str, optional): An npz with `images`, uint8 (N, 16, 16), or with `features`, (N, 64) of the same
            classifier. ``asset:...`` names one that the package ships, such as ``asset:digits/digits_16.npz``.
            Default None: no distance.
        classifier (str): Weights of the `DigitClassifier`. Default the shipped judge.
        device (str): Where the classifier runs. Default 'cpu', as it is small.
        batch_size (int): Images in one forward pass. Default 500.
        **kwargs: `collect_device`, `prefix` and `collect_dir` of MMEngine's `BaseMetric`.

    Raises:
        FileNotFoundError: `reference` or `classifier` names no file.
        ValueError: `reference` holds neither `images` nor `features` of these shapes.
    """

    default_prefix = 'digits'
    key = 'accuracy'
    differentiable = True

    def __init__(self, reference: str | None = None, classifier: str = PRETRAINED, device: str | None = 'cpu',
                 batch_size: int = 500, **kwargs) -> None:
        super().__init__(device=device, batch_size=batch_size, **kwargs)
        self.classifier = DigitClassifier.from_pretrained(classifier).to(self.device)
        self.reference = None if reference is None else _reference_features(reference, self.classifier)

    def judge(self, images: Tensor, prompts: list) -> Tensor:
        for prompt in prompts:
            _as_digit(prompt)
        return self.features(images)

    def reward(self, images: Tensor, prompts: list) -> Tensor:
        """The log-probability of the digit that was asked for, (B,)."""
        digits = torch.tensor([_as_digit(prompt) for prompt in prompts], device=images.device)
        return self.classifier(images).log_softmax(dim=1).gather(1, digits[:, None])[:, 0]

    def features(self, images: Tensor) -> Tensor:
        return classifier_features(images, self.classifier, self.batch_size)

    def least_images(self) -> int:
        return 0 if self.reference is None else NUM_FEATURES + 1

    def value(self, rows: Tensor, prompts: list, index: Tensor) -> dict[str, float]:
        """Returns `accuracy`, and `fd` where there is a reference."""
        metrics = dict(accuracy=_accuracy(rows, prompts, self.classifier))
        if self.reference is not None:
            metrics['fd'] = frechet_distance(rows, self.reference)
        return metrics


def _accuracy(features: Tensor, labels: Tensor | Sequence[int], classifier: DigitClassifier) -> float:
    labels = torch.as_tensor([_as_digit(label) for label in labels])
    if not len(features) == len(labels) > 0:
        raise ValueError(f'need one label an image and at least one, got {len(features)} images, {len(labels)} labels')
    logits = classifier.head(features.to(classifier.head.weight.device))
    return (logits.argmax(dim=1).cpu() == labels).double().mean().item()


def _as_digit(prompt: Any) -> int:
    try:
        digit = operator.index(prompt)  # unlike int(), takes neither '3' nor 3.7
    except TypeError:
        digit = -1
    if not 0 <= digit < NUM_CLASSES:
        raise ValueError(f'a prompt of the digits must be an integer from 0 to {NUM_CLASSES - 1}, got {prompt!r}')
    return digit


def _reference_features(path: str, classifier: DigitClassifier) -> Tensor:
    with np.load(assets.resolve(path)) as file:
        arrays = {key: file[key] for key in ('features', 'images') if key in file}
    if 'features' in arrays:
        features = torch.from_numpy(arrays['features'])
        if features.ndim != 2 or features.shape[1] != NUM_FEATURES:
            raise ValueError(f'{path}: expected `features` of shape (N, {NUM_FEATURES}), got {tuple(features.shape)}')
        return features
    if 'images' in arrays:
        return classifier_features(pixels_to_images(arrays['images']), classifier)
    raise ValueError(f'{path} holds neither `images` nor `features`: set `reference` of DigitMetric to an npz that '
                     'holds one of them')
