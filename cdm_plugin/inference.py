"""Trained models back in memory: from a config and a checkpoint, from an exported folder, or from a pipeline."""
import contextlib
import inspect
import json
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.logging import print_log
from mmengine.registry import MODELS
from mmengine.runner.checkpoint import CheckpointLoader, find_latest_checkpoint, load_state_dict
from torch import Tensor
from torch.nn.functional import interpolate
from tqdm import tqdm

from cdm_plugin.assets import resolve
from cdm_plugin.backbones import Backbone
from cdm_plugin.backbones.base import PARTS_FILE
from cdm_plugin.config import load_config
from cdm_plugin.data.embedding_files import read_index
from cdm_plugin.engine import StudentEMA
from cdm_plugin.engine.shards import is_sharded
from cdm_plugin.export import INDEX_FILE, missing_t5
from cdm_plugin.images import SHEET_SIDE, save_pngs
from cdm_plugin.methods import DiffusionModel
from cdm_plugin.methods.base import ROLES, TRAINED_KEYS


def load_method(source: str, checkpoint: Optional[str] = None, device: Optional[str] = None,
                image_size: Union[None, int, Sequence[int]] = None, encoders: bool = False,
                options: Optional[Dict[str, Any]] = None) -> DiffusionModel:
    """A method ready to sample.

    With a checkpoint, what belongs to its weights (method, losses, LoRA) is as it was trained, whatever the config
    says by now.

    Args:
        source (str): A folder (an exported one, or any pipeline of an architecture that is registered), or a config (a
            path or the name of a shipped recipe).
        checkpoint (str, optional): For a config: a checkpoint (a file, or a folder of shards), or a work directory
            whose latest one is taken.
            Default: the weights that the model starts from.
        device (str, optional): Default: MMEngine's choice.
        image_size (int or tuple, optional): Pixels, one number or (height, width). Default: the model's own.
        encoders (bool): Whether a model of cached embeddings gets the text encoders that made them. Default False.
        options (dict, optional): For a config: changes of it, dotted key -> value.

    Returns:
        DiffusionModel: In evaluation mode; `student_ema` is set if the checkpoint has one.
    """
    folder = Path(resolve(source))
    if folder.is_dir() and checkpoint is not None:
        raise ValueError(f'{source!r} is an exported folder, which has its weights: leave the checkpoint '
                         f'{checkpoint!r} out, or give the config instead of the folder')
    if folder.is_dir():
        method = _from_folder(folder)
    else:
        method = _from_config(load_config(source, options), checkpoint, encoders)
    if image_size is not None:
        method.set_image_size(*((image_size, image_size) if isinstance(image_size, int) else image_size))
    return method.to(device or get_device()).eval()


def _from_folder(folder: Path) -> DiffusionModel:
    parts_file = folder / PARTS_FILE
    if not parts_file.is_file():
        if (folder / INDEX_FILE).is_file():
            return _from_pipeline(folder)
        raise FileNotFoundError(f'{str(folder)!r} has no {PARTS_FILE}: it is no folder that `cdm export` wrote, and no '
                                'diffusers pipeline')
    parts = json.loads(parts_file.read_text())
    backbone, lora = dict(type=parts['backbone'], pretrained=str(folder)), None
    if 'lora' in parts:
        backbone, lora = _base_of(folder, parts), dict(parts['lora'], student=str(folder))
    return DiffusionModel(backbone=backbone, lora=lora, image_size=parts.get('image_size'),
                          sample_sigmas=parts.get('sample_sigmas', (1.0, 0.75, 0.5, 0.25)))


def _base_of(folder: Path, parts: Dict[str, Any]) -> Dict[str, Any]:
    """Config of the backbone that a LoRA file adapts."""
    pretrained = parts['base']['pretrained']
    if Path(pretrained).is_absolute() and not Path(pretrained).is_dir():
        raise FileNotFoundError(f'{str(folder)!r} has adapters of the base model {pretrained!r}, which is not there: '
                                f"put it back, or correct base.pretrained in the folder's {PARTS_FILE}")
    scheduler = FlowMatchEulerDiscreteScheduler.load_config(str(folder), subfolder='scheduler')
    return dict(parts['base'], type=parts['backbone'],
                scheduler={key: value for key, value in scheduler.items() if not key.startswith('_')},
                **{name: parts[name] for name in ('conditioner', 'codec') if parts.get(name)})


def _from_pipeline(folder: Path) -> DiffusionModel:
    """A pipeline that this package did not write, as a plain model with its usual number of steps."""
    index = json.loads((folder / INDEX_FILE).read_text())
    kinds: Dict[str, str] = {}
    for name, cls in MODELS.module_dict.items():
        if inspect.isclass(cls) and issubclass(cls, Backbone) and hasattr(cls, 'pipeline_name'):
            kinds.setdefault(cls.pipeline_name, name)
    kind = kinds.get(index.get('_class_name'))
    if kind is None:
        raise ValueError(f'{str(folder)!r} is a {index.get("_class_name")}, and no registered backbone takes that: '
                         f'there are backbones for {", ".join(sorted(kinds))}')
    method = DiffusionModel(backbone=dict(type=kind, pretrained=str(folder), conditioner=missing_t5(index) or None))
    method.sample_sigmas = step_sigmas(method.backbone.pipeline_defaults()['num_inference_steps'])
    return method


def _from_config(cfg: Config, checkpoint: Optional[str], encoders: bool) -> DiffusionModel:
    path, state = (None, {}) if checkpoint is None else _read_checkpoint(checkpoint)
    trained = state.get('config', {}).get('model', {})
    for key in TRAINED_KEYS if trained else ():
        if trained.get(key) != cfg.model.get(key):
            print_log(f'model.{key} is {trained.get(key)!r}, as {path} was trained', 'current')
            cfg.model[key] = trained.get(key)
    if cfg.model.get('lora') is not None:  # the weights come from the checkpoint
        cfg.model.lora = {k: v for k, v in cfg.model.lora.items() if k not in ROLES or checkpoint is None}
    if encoders:
        _give_encoders(cfg.model.backbone)
    method = MODELS.build({key: value for key, value in cfg.model.items() if value is not None})
    method.config = Config({**cfg.to_dict(), **state.get('config', {}), 'model': cfg.model.to_dict()})
    if checkpoint is None:
        return method
    try:
        load_state_dict(method, state['state_dict'], strict=True)
    except RuntimeError as error:
        lines = str(error).split()
        raise ValueError(f'the checkpoint {path} does not fit the config\'s model (trained '
                         f'{"with" if trained.get("lora") else "without"} model.lora): {" ".join(lines)[:400]}...'
                         ) from error
    done = state.get('meta', {}).get('iter')
    method.iteration = None if not done else done - 1  # as training left it
    if 'student_ema' in state:
        method.student_ema = StudentEMA(method.student)
        method.student_ema.load_state_dict(state['student_ema'])
    return method


def _read_checkpoint(checkpoint: str) -> Tuple[str, Dict[str, Any]]:
    path = checkpoint
    if Path(checkpoint).is_dir() and not is_sharded(checkpoint):
        path = find_latest_checkpoint(checkpoint)
        if path is None:
            raise FileNotFoundError(f'the work directory {checkpoint!r} has no checkpoint (iter_*.pth)')
    return path, CheckpointLoader.load_checkpoint(path, map_location='cpu', logger='silent')


def _give_encoders(backbone: Dict[str, Any]) -> None:
    """Puts the text encoders that made a cache in the place of the conditioner that only reads it."""
    conditioner = backbone.get('conditioner') or {}
    if conditioner.get('type') != 'EmbeddingConditioner':
        return
    index = read_index(Path(conditioner['folder'])) if Path(conditioner['folder']).is_dir() else None
    backbone['conditioner'] = dict(index['encoder']) if index else None


def student_weights(method: DiffusionModel, ema: bool) -> contextlib.AbstractContextManager:
    """Context in which the student carries its EMA weights, if wanted and there are any."""
    return method.student_ema.applied() if ema and method.student_ema is not None else contextlib.nullcontext()


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


def sample_files(method: DiffusionModel, prompts: List[Any], folder: Path, seed: int, batch_size: int,
                 prefix: str = '', **kwargs: Any) -> Tensor:
    """Draws a PNG a prompt, `<prefix><number>.png`, each batch written as soon as it is drawn.

    Image i depends on the seed and i alone, not on the batch size or on what else is drawn.

    Args:
        method (DiffusionModel): The method.
        prompts (list): N texts or class labels.
        folder (Path): Where to.
        seed (int): Of the noise.
        batch_size (int): Samples of one batch.
        prefix (str): Of the files' names. Default none.
        **kwargs: Passed to `DiffusionModel.sample`.

    Returns:
        Tensor: The images shrunk to a contact sheet's size, (N, 3 or 1, h, w), on the CPU.
    """
    small = []
    with tqdm(total=len(prompts), desc=kwargs.get('role', 'student'), unit='image') as bar:
        for start in range(0, len(prompts), batch_size):
            part = prompts[start:start + batch_size]
            numbers = range(start, start + len(part))
            images = sample_prompts(method, part, method.noise(seed, numbers), len(part), **kwargs)
            save_pngs(images, folder, [f'{prefix}{i:04d}' for i in numbers])
            factor = min(1.0, SHEET_SIDE / max(images.shape[-2:]))
            small.append(images if factor == 1 else interpolate(images, scale_factor=factor, mode='area'))
            bar.update(len(part))
    return torch.cat(small)


def step_sigmas(steps: int) -> Tensor:
    """The usual levels of `steps` steps before the scheduler's shift: 1, 1 - 1/steps, ..., 1/steps."""
    if steps < 1:
        raise ValueError(f'steps must be 1 or more, but is {steps}')
    return torch.linspace(1, 1 / steps, steps, dtype=torch.float64)
