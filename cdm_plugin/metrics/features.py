"""Feature spaces in which sets of images are compared."""
import importlib
import io
import sys
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from cdm_plugin import assets
from cdm_plugin.data.images import SUFFIXES, read_image
from cdm_plugin.metrics.base import ImageMetric, MissingMetric, SetMetric
from cdm_plugin.metrics.clip_scores import CLIP_H14, CLIPJudge
from cdm_plugin.metrics.weights import download_command, load_state
from cdm_plugin.sheets import to_pixels

INCEPTION = ('https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/'
             'weights-inception-2015-12-05-6726825d.pth')


class InceptionJudge:
    """The 2048 pooled features of the InceptionV3 that FID is defined on (its TensorFlow weights of 2015).

    The network is torch-fidelity's, which reproduces the original one to rounding, the TensorFlow 1 resize to 299
    included: numbers are comparable to published ones. Of the alternatives, clean-fid imports torchvision, of which
    there is no build for every torch, and resizes in another way; torchmetrics takes this very network from
    torch-fidelity. torch-fidelity as a package imports torchvision too, but the modules of the network do not, and
    only these are imported.

    Args:
        pretrained (str): URL or file of the weights; of a pickle only tensors are read.
        device (torch.device): Where it runs, in float32.

    Raises:
        ImportError: torch-fidelity is not installed.
        OSError: There are no such weights.
    """

    def __init__(self, pretrained: str, device: torch.device) -> None:
        extractor = _torch_fidelity('feature_extractor_inceptionv3').FeatureExtractorInceptionV3
        # The extractor unpickles what it is given without `weights_only`: it gets tensors only.
        weights = io.BytesIO()
        torch.save(load_state(pretrained), weights)
        weights.seek(0)
        self.network = extractor('inception', ['2048'], feature_extractor_weights_path=weights).to(device)
        self.device = device

    def embed_images(self, images: Tensor) -> Tensor:
        """Features (B, 2048) of images (B, C, H, W) in [-1, 1], rounded to 8 bits."""
        pixels = torch.from_numpy(to_pixels(images).transpose(0, 3, 1, 2).copy()).to(self.device)
        return self.network(pixels)[0]

Space = Literal['inception', 'clip']


class FeatureMetric(SetMetric):
    """A set metric in a feature space of one's choice.

    Args:
        space (str): 'inception', or 'clip', the unit vectors of CLIP's image embeddings. Default 'inception'.
        pretrained (str, optional): Weights: a URL or a file for 'inception', a hub id or a folder of a `CLIPModel`
            for 'clip'. Default None: the published ones.
        **kwargs: Of `ImageMetric`.
    """

    def __init__(self, space: Space = 'inception', pretrained: str | None = None, **kwargs) -> None:
        super().__init__(**kwargs)
        self.space = space
        self.pretrained = pretrained or (INCEPTION if space == 'inception' else CLIP_H14)
        self.network: InceptionJudge | CLIPJudge | None = None

    def load(self) -> None:
        judge = InceptionJudge if self.space == 'inception' else CLIPJudge
        with self.needs(self.pretrained, get=download_command(self.pretrained)):
            self.network = judge(self.pretrained, self.device)

    def unload(self) -> None:
        self.network = None

    def features(self, images: Tensor) -> Tensor:
        return self.network.embed_images(images)


class ReferenceMetric(FeatureMetric):
    """A feature metric against a reference set.

    Args:
        reference (str): A folder of pictures (searched through, read as training pictures are, transparency on white),
            or an npz with `features` (M, D) of the same space.
        **kwargs: Of `FeatureMetric`.
    """

    def __init__(self, reference: str, **kwargs) -> None:
        super().__init__(**kwargs)
        self.reference_path = reference
        self.reference: Tensor | None = None

    def load(self) -> None:
        if self.reference is not None:  # kept over `release`: it is small, and was slow to come by
            super().load()
            return
        path = Path(assets.resolve(self.reference_path))
        files = sorted(p for p in path.rglob('*') if p.suffix.lower() in SUFFIXES) if path.is_dir() else []
        if not files and not path.is_file():
            raise MissingMetric(f'{self.name} has no reference at {self.reference_path!r}: set `reference` of '
                                f'{self.name} to a folder of pictures, or to an npz with `features`')
        super().load()
        self.reference = _picture_features(files, self) if files else _stored_features(path, self)


def _torch_fidelity(name: str) -> Any:
    """A module of torch-fidelity, without running the package's own imports."""
    if 'torch_fidelity' in sys.modules:
        return importlib.import_module(f'torch_fidelity.{name}')
    spec = find_spec('torch_fidelity')
    if spec is None:
        raise ModuleNotFoundError('No module named torch_fidelity', name='torch_fidelity')
    sys.modules['torch_fidelity'] = module_from_spec(spec)
    try:
        return importlib.import_module(f'torch_fidelity.{name}')
    finally:
        del sys.modules['torch_fidelity']  # whoever imports the package gets all of it


def _picture_features(files: list[Path], metric: ImageMetric) -> Tensor:
    parts = []
    for start in range(0, len(files), metric.batch_size):
        images = [read_image(file) for file in files[start:start + metric.batch_size]]
        parts.append(metric.judge_all(images, [''] * len(images)))
    return torch.cat(parts)


def _stored_features(path: Path, metric: ImageMetric) -> Tensor:
    with np.load(path) as file:
        if 'features' not in file or file['features'].ndim != 2:
            raise ValueError(f'{path} holds no `features` of shape (M, D): set `reference` of {metric.name} to an npz '
                             'that does, or to a folder of pictures')
        return torch.from_numpy(file['features']).float()
