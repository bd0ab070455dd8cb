"""Trained models back in memory: from a config and a checkpoint, or from an exported folder; and out again."""
import contextlib
import json
from pathlib import Path
from typing import Any, List, Optional, Union

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import MODELS
from mmengine.runner.checkpoint import CheckpointLoader, find_latest_checkpoint, load_state_dict
from torch import Tensor

from cdm_plugin.assets import resolve
from cdm_plugin.backbones.base import PARTS_FILE
from cdm_plugin.config import load_config
from cdm_plugin.engine import StudentEMA
from cdm_plugin.methods import DiffusionModel
from cdm_plugin.networks import unwrap


def load_method(source: str, checkpoint: Optional[str] = None, device: Optional[str] = None) -> DiffusionModel:
    """A method ready to sample.

    Args:
        source (str): An exported folder, or a config (a path or the name of a shipped recipe).
        checkpoint (str, optional): For a config: a checkpoint file, or a work directory whose latest one is taken.
            Default: the weights that the model starts from.
        device (str, optional): Default: MMEngine's choice.

    Returns:
        DiffusionModel: In evaluation mode; `student_ema` is set if the checkpoint has one.
    """
    folder = Path(resolve(source))
    if folder.is_dir() and checkpoint is not None:
        raise ValueError(f'{source!r} is an exported folder, which has its weights: leave the checkpoint '
                         f'{checkpoint!r} out, or give the config instead of the folder')
    method = _from_folder(folder) if folder.is_dir() else _from_config(load_config(source), checkpoint)
    return method.to(device or get_device()).eval()


def _from_folder(folder: Path) -> DiffusionModel:
    parts_file = folder / PARTS_FILE
    if not parts_file.is_file():
        raise FileNotFoundError(f'{str(folder)!r} has no {PARTS_FILE}: it is no folder that `cdm export` wrote')
    parts = json.loads(parts_file.read_text())
    return DiffusionModel(backbone=dict(type=parts['backbone'], pretrained=str(folder)),
                          image_size=parts.get('image_size'),
                          sample_sigmas=parts.get('sample_sigmas', (1.0, 0.75, 0.5, 0.25)))


def _from_config(cfg: Config, checkpoint: Optional[str]) -> DiffusionModel:
    method = MODELS.build(cfg.model)
    if checkpoint is None:
        return method
    path = checkpoint
    if Path(checkpoint).is_dir():
        path = find_latest_checkpoint(checkpoint)
        if path is None:
            raise FileNotFoundError(f'the work directory {checkpoint!r} has no checkpoint (iter_*.pth)')
    state = CheckpointLoader.load_checkpoint(path, map_location='cpu', logger='silent')
    try:
        load_state_dict(method, state['state_dict'], strict=True)
    except RuntimeError as error:
        raise ValueError(f'the checkpoint {path} does not fit the config\'s model: {error}') from error
    if 'student_ema' in state:
        method.student_ema = StudentEMA(method.student)
        method.student_ema.load_state_dict(state['student_ema'])
    return method


def student_weights(method: DiffusionModel, ema: bool) -> contextlib.AbstractContextManager:
    """Context in which the student carries its EMA weights, if wanted and there are any."""
    return method.student_ema.applied() if ema and method.student_ema is not None else contextlib.nullcontext()


def export(method: DiffusionModel, folder: Union[str, Path], ema: bool = True) -> Path:
    """Writes the student as a folder of diffusers' layout, safetensors only.

    Args:
        method (DiffusionModel): The trained method.
        folder (str): Where to; made if need be.
        ema (bool): Whether to write the EMA weights (the student's own if there are none). Default True.

    Returns:
        Path: The folder. `SD3Transformer2DModel.from_pretrained(folder, subfolder='transformer')` opens the network,
        `cdm sample folder` and `backbone.pretrained=folder` the whole.
    """
    image_size = [side * method.backbone.codec.scale for side in method.latent_size]
    with student_weights(method, ema):
        method.backbone.save_pretrained(unwrap(method.student), folder, image_size=image_size,
                                        sample_sigmas=method.sample_sigmas.tolist())
    return Path(folder)


@torch.no_grad()
def sample_prompts(method: DiffusionModel, prompts: List[Any], noise: Tensor, batch_size: int = 250,
                   **kwargs: Any) -> Tensor:
    """Images for a list of prompts, in batches.

    Args:
        method (DiffusionModel): The method.
        prompts (list): N texts or class labels.
        noise (Tensor): Standard normal, (N, C, h, w): one row a prompt, so that models can be compared.
        batch_size (int): Samples of one batch. Default 250.
        **kwargs: Passed to `DiffusionModel.sample` (`sigmas`, `role`, `guidance_scale`, ...).

    Returns:
        Tensor: Images in [-1, 1], (N, 3 or 1, H, W), on the CPU.
    """
    images = []
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        data = method.data_preprocessor([dict(prompt=p) for p in prompts[part]], False)
        images.append(method.sample(method.backbone.condition(data), noise[part], **kwargs).cpu())
    return torch.cat(images)


def step_sigmas(steps: int) -> Tensor:
    """The usual levels of `steps` steps before the scheduler's shift: 1, 1 - 1/steps, ..., 1/steps."""
    if steps < 1:
        raise ValueError(f'steps must be 1 or more, but is {steps}')
    return torch.linspace(1, 1 / steps, steps, dtype=torch.float64)
