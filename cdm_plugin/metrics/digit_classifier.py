"""The judge of the digits demo: a small classifier whose penultimate layer gives the features of the distance."""
import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from cdm_plugin import assets

NUM_CLASSES = 10
NUM_FEATURES = 64
PRETRAINED = 'asset:digits/classifier.safetensors'


class DigitClassifier(nn.Module):
    """A convolutional classifier of 16x16 digits (86,514 parameters, no normalisation layers).

    `forward` takes images (B, 1, 16, 16) in [-1, 1], -1 is background, and returns logits (B, 10).
    """

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _conv(1, 24), _conv(24, 24), nn.MaxPool2d(2),
            _conv(24, 48), _conv(48, 48), nn.MaxPool2d(2),
            # SiLU, because a quarter of the features die behind a ReLU and then measure nothing
            nn.Flatten(), nn.Linear(48 * 4 * 4, NUM_FEATURES), nn.SiLU())
        self.head = nn.Linear(NUM_FEATURES, NUM_CLASSES)

    def features(self, images: Tensor) -> Tensor:
        """Returns the penultimate activations (B, 64) of images (B, 1, 16, 16) in [-1, 1]."""
        return self.body(images)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))

    @classmethod
    def from_pretrained(cls, path: str = PRETRAINED) -> 'DigitClassifier':
        """Loads a trained classifier, frozen and in eval mode, on the CPU.

        Args:
            path (str): A safetensors file: ``asset:...`` for one that the package ships, or a path. Default the
                shipped judge.

        Raises:
            FileNotFoundError: There is no such file.
        """
        classifier = cls()
        classifier.load_state_dict(load_file(assets.resolve(path)))
        return classifier.eval().requires_grad_(False)


def pixels_to_images(pixels: np.ndarray) -> Tensor:
    """Turns uint8 pixels (N, H, W), 0 is background, into float32 images (N, 1, H, W) in [-1, 1].

    Raises:
        ValueError: `pixels` has another dtype or number of dimensions.
    """
    pixels = np.asarray(pixels)
    if pixels.dtype != np.uint8 or pixels.ndim != 3:
        raise ValueError(f'expected uint8 pixels of shape (N, H, W), got {pixels.dtype} of shape {pixels.shape}')
    return torch.from_numpy(pixels).float().div(127.5).sub(1).unsqueeze(1)


def _conv(channels_in: int, channels_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels_in, channels_out, 3, padding=1), nn.ReLU())
