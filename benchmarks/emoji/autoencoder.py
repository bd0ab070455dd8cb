"""A small autoencoder of the emoji, trained by MMEngine's runner, for the latent form of the study."""
import os
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from mmengine.runner import Runner
from torch import Tensor

import cdm_plugin  # noqa: F401  registers the datasets
from cdm_plugin.codecs import Codec

CONFIG = Path(__file__).with_name('autoencoder_kl_1xb16_2k.py')


@MODELS.register_module(force=True)  # the file may be imported by two names
class AutoencoderTraining(BaseModel):
    """Trains diffusers' AutoencoderKL: L1 of the pixels and of their edges, and the divergence of the posterior from a
    normal distribution (Rombach et al. 2022, without their discriminator and perceptual network).

    Args:
        autoencoder (dict): Arguments of AutoencoderKL.
        edge_weight (float): Weight of the differences of neighbours, which keep outlines sharp.
        kl_weight (float): Weight of the divergence of a latent value.
    """

    def __init__(self, autoencoder: dict[str, Any], edge_weight: float, kl_weight: float) -> None:
        super().__init__()
        self.vae = AutoencoderKL(**autoencoder)
        self.edge_weight, self.kl_weight = edge_weight, kl_weight

    def forward(self, image: Tensor, mode: str = 'loss', **fields: Any) -> dict[str, Tensor]:
        """Losses of pictures (B, 3, H, W) in [-1, 1]."""
        posterior = self.vae.encode(image).latent_dist
        error = self.vae.decode(posterior.sample()).sample - image
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        return dict(loss_pixels=error.abs().mean(), loss_edges=self.edge_weight * edges,
                    loss_kl=self.kl_weight * posterior.kl().mean() / posterior.mean[0].numel())


def autoencoder_config(data: Path, work_dir: Path, iterations: int) -> Config:
    """The config beside this file, on the pictures of `data`, its schedule as long as the run."""
    cfg = Config.fromfile(CONFIG)
    cfg.train_dataloader.dataset.data_root = str(data)
    warm_up = max(1, iterations // 20)
    first, second = cfg.param_scheduler
    first.end, second.begin, second.end = warm_up, warm_up, iterations
    cfg.train_cfg.max_iters = iterations
    cfg.default_hooks.checkpoint = None  # minutes long: one that is cut off begins anew
    cfg.work_dir, cfg.log_level = str(work_dir), 'WARNING'
    cfg.experiment_name = f'autoencoder-{os.getpid()}-{time.time_ns()}'
    return cfg


@torch.no_grad()
def set_scale(vae: AutoencoderKL, pictures: Tensor, batch_size: int = 256) -> None:
    """Sets the config's `shift_factor` and `scaling_factor` so that latents of pictures (N, 3, H, W) have the mean 0
    and the standard deviation 1."""
    device = next(vae.parameters()).device
    latents = torch.cat([vae.encode(part.to(device)).latent_dist.mode() for part in pictures.split(batch_size)])
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())


def train_autoencoder(cfg: Config, pictures: Tensor, out: Path) -> None:
    """Trains by a config and saves the autoencoder, scaled by pictures (N, 3, H, W), in the folder `vae` of `out`."""
    runner = Runner.from_cfg(cfg)
    runner.train()
    vae = runner.model.vae.eval()
    set_scale(vae, pictures)
    vae.save_pretrained(out / 'vae')


@torch.no_grad()
def reconstruct(codec: Codec, pictures: Tensor, batch_size: int = 256) -> Tensor:
    """Pictures (N, 3, H, W) in [-1, 1] through a codec and back."""
    return torch.cat([codec.decode(codec.encode(part)).cpu() for part in pictures.split(batch_size)])


def psnr(pictures: Tensor, others: Tensor) -> float:
    """Peak signal-to-noise ratio of N pictures in [-1, 1], in dB: the mean of each picture's."""
    squared = (pictures - others).square().flatten(1).mean(1)
    return (10 * (4 / squared).log10()).mean().item()
