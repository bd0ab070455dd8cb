"""Codecs: between images in [-1, 1] and the latents that the networks see."""
import inspect
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKL
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle
from torch.utils.checkpoint import checkpoint

from cdm_plugin.arguments import Count
from cdm_plugin.pretrained import (
    HUB_KEYS,
    absolute_folder,
    check_dtype,
    check_folder,
    check_load_keys,
    naming_absent,
    origin,
)


def crop_latents(latents: Tensor, place: Tensor, side: int) -> Tensor:
    """A square of each sample's latents.

    Args:
        latents (Tensor): (B, C, h, w).
        place (Tensor): Where the squares lie, (B, 2) in [0, 1): of the rows and columns that are possible.
        side (int): Latents of the square's side; no more than there are.

    Returns:
        Tensor: (B, C, side, side) at most.
    """
    side_h, side_w = (min(side, n) for n in latents.shape[-2:])
    free = place.new_tensor([latents.shape[-2] - side_h + 1, latents.shape[-1] - side_w + 1])
    corners = (place * free).long().tolist()
    return torch.stack([x[:, top:top + side_h, left:left + side_w] for x, (top, left) in zip(latents, corners)])


class Codec(nn.Module):
    """Base class. A codec is frozen: it is never trained and never saved into checkpoints.

    Attributes:
        scale (int): Pixels of a latent's side.
        light (bool): Whether building it reads no weights; `cdm doctor` then builds it. Default False.
    """
    config_key = 'model.backbone.codec'
    scale: int = 1
    light = False

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3 or 1, H, W) in [-1, 1] to latents (B, C, H / scale, W / scale)."""
        raise NotImplementedError

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) to images in [-1, 1], (B, 3 or 1, h scale, w scale). Gradients pass through."""
        raise NotImplementedError

    def decode_recomputed(self, latents: Tensor) -> Tensor:
        """`decode` for a loss: one image at a time, whose activations are not kept but computed anew in backward. With
        `crop_latents` before it, a large image costs the memory of a small one."""
        return torch.cat([checkpoint(self.decode, one, use_reentrant=False) for one in latents.split(1)])

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the latents of an image size in pixels."""
        if height % self.scale or width % self.scale:
            raise ValueError(f'image size {height}x{width} must be divisible by {self.scale}')
        return height // self.scale, width // self.scale

    def to_config(self) -> dict[str, Any] | None:
        """The config that rebuilds this codec, or None if that cannot be written down."""
        return None


@MODELS.register_module()
class PixelCodec(Codec):
    """Pixel space: blocks of `scale` x `scale` pixels become channels; no weights, no loss.

    Args:
        scale (int): Side of a block in pixels. Default 1.
    """
    light = True

    def __init__(self, scale: Count = 1) -> None:
        super().__init__()
        self.scale = scale

    def encode(self, images: Tensor) -> Tensor:
        self.latent_size(*images.shape[-2:])
        return pixel_unshuffle(images, self.scale)

    def decode(self, latents: Tensor) -> Tensor:
        return pixel_shuffle(latents, self.scale).clamp(-1, 1)

    def to_config(self) -> dict[str, Any]:
        return dict(type='PixelCodec', scale=self.scale)


@MODELS.register_module()
class VAECodec(Codec):
    """Diffusers' AutoencoderKL, scaled and shifted as its config says.

    Args:
        pretrained (str): Hub id or folder of a pipeline.
        subfolder (str): Where the autoencoder lies in it. Default 'vae'.
        dtype (str): Weights' dtype. Default 'float32'.
        lazy (bool): Whether the weights are read when something is first encoded or decoded; a training on cached
            latents then has none, until a picture is drawn. Default False.
        **load_kwargs: Passed to `from_pretrained` (`revision`, `variant`, ...).

    Attributes:
        vae (nn.Module): The autoencoder; asking for it reads it.
    """
    vae_class: type[Any] = AutoencoderKL

    def __init__(self, pretrained: str, subfolder: str = 'vae', dtype: str = 'float32', lazy: bool = False,
                 **load_kwargs: Any) -> None:
        super().__init__()
        check_load_keys(load_kwargs, 'model.backbone.codec', type(self))
        check_folder(pretrained, pretrained, 'model.backbone.codec.pretrained',
                     'the folder of a pipeline, with the autoencoder in `subfolder`')
        self.register_buffer('_here', torch.empty(0), persistent=False)
        # What the weights are read by; None when they are there.
        self._unread: Any = (pretrained, subfolder, check_dtype(dtype, 'model.backbone.codec.dtype'), load_kwargs)
        self._config = dict(type=type(self).__name__, pretrained=absolute_folder(pretrained), subfolder=subfolder,
                            dtype=dtype, **origin(load_kwargs))
        if lazy:
            defaults = {name: p.default for name, p in inspect.signature(self.vae_class.__init__).parameters.items()}
            with naming_absent(pretrained, 'model.backbone.codec.pretrained'):
                config = self.vae_config(pretrained, subfolder,
                                         **{k: v for k, v in load_kwargs.items() if k in HUB_KEYS})
            self.scale = self.scale_of(SimpleNamespace(**{**defaults, **config}))
        else:
            self._read()

    def __getattr__(self, name: str) -> Any:
        if name in ('vae', 'shift', 'factor') and vars(self).get('_unread') is not None:
            self._read()
            self.to(self._here.device)
            return getattr(self, name)
        return super().__getattr__(name)

    @property
    def loaded(self) -> bool:
        """Whether the weights are in memory."""
        return self._unread is None

    def _read(self) -> None:
        (pretrained, subfolder, dtype, load_kwargs), self._unread = self._unread, None
        with naming_absent(pretrained, 'model.backbone.codec.pretrained'):
            self.vae = self.load_vae(pretrained, subfolder, dtype, **load_kwargs)
        self.vae.requires_grad_(False).eval()
        self.vae.enable_slicing()  # one image at a time: a batch at full size takes tens of gigabytes
        self.read_config(self.vae.config)

    def scale_of(self, config: Any) -> int:
        """Pixels of a latent's side, as the autoencoder's config says."""
        return 2**(len(config.block_out_channels) - 1)

    def read_config(self, config: Any) -> None:
        """Sets `scale`, and `shift` and `factor`, numbers or (C, 1, 1): latents are (mode - shift) factor."""
        self.scale = self.scale_of(config)
        self.shift, self.factor = config.shift_factor or 0.0, config.scaling_factor

    def vae_config(self, pretrained: str, subfolder: str, **load_kwargs: Any) -> dict[str, Any]:
        """The autoencoder's config."""
        return self.vae_class.load_config(pretrained, subfolder=subfolder, **load_kwargs)

    def load_vae(self, pretrained: str, subfolder: str, dtype: torch.dtype, **load_kwargs: Any) -> nn.Module:
        """The autoencoder with its weights."""
        return self.vae_class.from_pretrained(pretrained, subfolder=subfolder, dtype=dtype, **load_kwargs)

    def to_config(self) -> dict[str, Any]:
        return self._config

    def run_encoder(self, images: Tensor) -> Tensor:
        """The autoencoder's mode of images."""
        return self.vae.encode(images).latent_dist.mode()

    def run_decoder(self, latents: Tensor) -> Tensor:
        """The autoencoder's images of latents."""
        return self.vae.decode(latents, return_dict=False)[0]

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Encodes to the posterior's mode, which needs no random number."""
        self.latent_size(*images.shape[-2:])
        mode = self.run_encoder(images.to(self.vae.dtype))
        return (mode.float() - self.shift) * self.factor

    def decode(self, latents: Tensor) -> Tensor:
        latents = latents / self.factor + self.shift
        return self.run_decoder(latents.to(self.vae.dtype)).float().clamp(-1, 1)
