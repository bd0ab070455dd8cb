"""Codecs: between images in [-1, 1] and the latents that the networks see."""
from typing import Any, Dict, Optional, Tuple

import torch
from diffusers import AutoencoderKL
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from cdm_plugin.conditioners import absolute_folder, check_dtype, check_load_keys, origin


class Codec(nn.Module):
    """Base class. A codec is frozen: it is never trained and never saved into checkpoints.

    Attributes:
        scale (int): Pixels of a latent's side.
    """
    scale: int = 1

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3 or 1, H, W) in [-1, 1] to latents (B, C, H / scale, W / scale)."""
        raise NotImplementedError

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) to images in [-1, 1], (B, 3 or 1, h scale, w scale)."""
        raise NotImplementedError

    def latent_size(self, height: int, width: int) -> Tuple[int, int]:
        """Height and width of the latents of an image size in pixels."""
        if height % self.scale or width % self.scale:
            raise ValueError(f'image size {height}x{width} (model.image_size) must be divisible by {self.scale}')
        return height // self.scale, width // self.scale

    def to_config(self) -> Optional[Dict[str, Any]]:
        """The config that rebuilds this codec, or None if that cannot be written down."""
        return None


@MODELS.register_module()
class PixelCodec(Codec):
    """Pixel space: blocks of `scale` x `scale` pixels become channels; no weights, no loss.

    Args:
        scale (int): Side of a block in pixels. Default 1.
    """

    def __init__(self, scale: int = 1) -> None:
        super().__init__()
        self.scale = scale

    def encode(self, images: Tensor) -> Tensor:
        self.latent_size(*images.shape[-2:])
        return pixel_unshuffle(images, self.scale)

    def decode(self, latents: Tensor) -> Tensor:
        return pixel_shuffle(latents, self.scale).clamp(-1, 1)

    def to_config(self) -> Dict[str, Any]:
        return dict(type='PixelCodec', scale=self.scale)


@MODELS.register_module()
class VAECodec(Codec):
    """Diffusers' AutoencoderKL, scaled and shifted as its config says.

    Args:
        pretrained (str): Hub id or folder of a pipeline.
        subfolder (str): Where the autoencoder lies in it. Default 'vae'.
        dtype (str): Weights' dtype. Default 'float32'.
        **load_kwargs: Passed to `from_pretrained` (`revision`, `variant`, ...).
    """

    def __init__(self, pretrained: str, subfolder: str = 'vae', dtype: str = 'float32', **load_kwargs: Any) -> None:
        super().__init__()
        check_load_keys(load_kwargs, 'model.backbone.codec', type(self))
        self.vae = AutoencoderKL.from_pretrained(
            pretrained, subfolder=subfolder, dtype=check_dtype(dtype, 'model.backbone.codec.dtype'),
            **load_kwargs)
        self.vae.requires_grad_(False).eval()
        self.vae.enable_slicing()  # one image at a time: a batch at full size takes tens of gigabytes
        self.scale = 2**(len(self.vae.config.block_out_channels) - 1)
        self._config = dict(type='VAECodec', pretrained=absolute_folder(pretrained), subfolder=subfolder, dtype=dtype,
                            **origin(load_kwargs))
        self.shift, self.factor = self.vae.config.shift_factor or 0.0, self.vae.config.scaling_factor

    def to_config(self) -> Dict[str, Any]:
        return self._config

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Encodes to the posterior's mode, which needs no random number."""
        self.latent_size(*images.shape[-2:])
        mode = self.vae.encode(images.to(self.vae.dtype)).latent_dist.mode()
        return (mode.float() - self.shift) * self.factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        latents = latents / self.factor + self.shift
        return self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0].float().clamp(-1, 1)
