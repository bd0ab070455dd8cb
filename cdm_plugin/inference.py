"""Trained models back in memory: from a config and a checkpoint, from an exported folder, or from a pipeline."""
import contextlib
import inspect
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import FlowMatchEulerDiscreteScheduler
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.logging import print_log
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn.functional import interpolate
from tqdm import tqdm

from cdm_plugin.assets import resolve
from cdm_plugin.backbones import Backbone
from cdm_plugin.backbones.parts import PARTS_FILE, read_parts
from cdm_plugin.compat.checkpoints import load_mapped
from cdm_plugin.conditioners import EmbeddingConditioner
from cdm_plugin.config import load_config, naming_parts
from cdm_plugin.data.embeddings.files import INDEX, read_index
from cdm_plugin.engine import StudentEMA
from cdm_plugin.engine.loading import as_checkpoint, check_whole, is_weights, named_as
from cdm_plugin.engine.shard_files import is_sharded, read_whole
from cdm_plugin.export import INDEX_FILE, missing_t5
from cdm_plugin.files import find_latest_checkpoint
from cdm_plugin.flow import full_precision
from cdm_plugin.methods import DiffusionModel, FlowMatching
from cdm_plugin.methods.base import TRAINED_KEYS
from cdm_plugin.registry import checked_types, is_type, registered
from cdm_plugin.roles.lora import STARTS
from cdm_plugin.sampling import step_sigmas
from cdm_plugin.secrets import masked, unmasked, without_secrets
from cdm_plugin.sheets import SHEET_SIDE, save_pngs

STUDENT = ('student',)
# What a method that samples in its own way changes.
SAMPLING = ('sample', 'sample_latents', 'velocity', 'shift', 'latent_shape', 'null_condition', 'build_trained')


def load_method(source: str, checkpoint: str | None = None, device: str | None = None,
                image_size: None | int | Sequence[int] = None, encoders: bool = False,
                options: dict[str, Any] | None = None, roles: Collection[str] = STUDENT) -> DiffusionModel:
    """A method ready to sample.

    With a checkpoint, what belongs to its weights (method, losses, LoRA) is as it was trained, whatever the config
    says by now. Of a checkpoint file the weights stay on the disk until they are used, and the others take no memory.

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
        roles (Collection[str]): For a config: whose networks are needed. The student alone comes as a plain
            `DiffusionModel`, which has neither losses nor `alpha`; any other role brings the whole method. Default
            ('student',).

    Returns:
        DiffusionModel: In evaluation mode; `student_ema` is set if the checkpoint has one.
    """
    folder = Path(resolve(source))
    if folder.is_dir() and checkpoint is not None:
        raise ValueError(f'{source!r} is an exported folder, which has its weights: leave the checkpoint '
                         f'{checkpoint!r} out, or give the config instead of the folder')
    if folder.is_dir():
        method = _from_folder(folder, image_size)
    else:
        cfg = load_config(source, options, keys=('model',))
        if image_size is not None:
            cfg.model['image_size'] = image_size
        with naming_parts(cfg):
            method = _from_config(cfg, checkpoint, encoders, roles)
    return method.to(device or get_device()).eval()


def _from_folder(folder: Path, image_size: Any) -> DiffusionModel:
    parts_file = folder / PARTS_FILE
    if not parts_file.is_file():
        if (folder / INDEX_FILE).is_file():
            return _from_pipeline(folder, image_size)
        raise FileNotFoundError(f'{str(folder)!r} has no {PARTS_FILE}: it is no folder that `cdm export` wrote, and no '
                                'diffusers pipeline')
    parts = read_parts(folder)
    if not is_type(registered(parts.get('backbone'), MODELS), Backbone):
        raise ValueError(f'{parts_file}: backbone={parts.get("backbone")!r} is refused: it must be a backbone that '
                         f'cdm_plugin or a loaded plug-in has registered: {", ".join(sorted(_backbones()))}')
    backbone, lora = dict(type=parts['backbone'], pretrained=str(folder)), None
    if 'lora' in parts:
        backbone, lora = _base_of(folder, parts), dict(parts['lora'], student=str(folder))
    return DiffusionModel(backbone=backbone, lora=lora, image_size=image_size or parts.get('image_size'),
                          sample_sigmas=parts.get('sample_sigmas', (1.0, 0.75, 0.5, 0.25)),
                          rollout=parts.get('rollout', 'ode'))


def _base_of(folder: Path, parts: dict[str, Any]) -> dict[str, Any]:
    """Config of the backbone that a LoRA file adapts."""
    base = parts.get('base')
    if not isinstance(base, dict) or not isinstance(base.get('pretrained'), str):
        raise ValueError(f'{folder / PARTS_FILE}: base.pretrained must be the hub id or folder of the base model')
    if Path(base['pretrained']).is_absolute() and not Path(base['pretrained']).is_dir():
        raise FileNotFoundError(f'{str(folder)!r} has adapters of the base model {base["pretrained"]!r}, which is not '
                                f"there: put it back, or correct base.pretrained in the folder's {PARTS_FILE}")
    scheduler = FlowMatchEulerDiscreteScheduler.load_config(str(folder), subfolder='scheduler')
    return checked_types(dict(
        base, type=parts['backbone'],
        scheduler={key: value for key, value in scheduler.items()
                   if not key.startswith('_') and key != 'stochastic_sampling'},  # the folder's `rollout` says it
        **{name: parts[name] for name in ('conditioner', 'codec') if parts.get(name)}), folder / PARTS_FILE, 'base')


def _backbones() -> dict[str, type[Backbone]]:
    """The registered backbones by their names."""
    return {name: cls for name, cls in MODELS.module_dict.items()
            if is_type(cls, Backbone) and cls.pipeline_name}


def _from_pipeline(folder: Path, image_size: Any) -> DiffusionModel:
    """A pipeline that this package did not write, as a plain model with its usual number of steps."""
    index = json.loads((folder / INDEX_FILE).read_text())
    kinds: dict[str, str] = {}
    for name, cls in _backbones().items():
        kinds.setdefault(cls.pipeline_name, name)
    kind = kinds.get(str(index.get('_class_name')))
    if kind is None:
        raise ValueError(f'{str(folder)!r} is a {index.get("_class_name")}, and no registered backbone takes that: '
                         f'there are backbones for {", ".join(sorted(kinds))}')
    method = DiffusionModel(backbone=dict(type=kind, pretrained=str(folder), conditioner=missing_t5(index) or None),
                            image_size=image_size)
    stochastic = method.backbone.scheduler.config.stochastic_sampling or 'FlowMatchLCMScheduler' in index['scheduler']
    method.rollout = 'renoise' if stochastic else 'ode'
    method.sample_sigmas = step_sigmas(method.backbone.pipeline_defaults()['num_inference_steps'])
    return method


def _from_config(cfg: Config, checkpoint: str | None, encoders: bool, roles: Collection[str]) -> DiffusionModel:
    path, state = (None, {}) if checkpoint is None else _read_checkpoint(checkpoint, roles)
    saved = state.get('config') if isinstance(state.get('config'), dict) else {}
    trained = saved.get('model') if isinstance(saved.get('model'), dict) else {}
    cfg.model.update(_trained_settings(trained, path, cfg.model))
    if cfg.model.get('lora') is not None:  # the weights come from the checkpoint
        cfg.model.lora = {k: v for k, v in cfg.model.lora.items() if k not in STARTS or checkpoint is None}
    if encoders:
        _give_encoders(cfg.model.backbone)
    method = _build({key: value for key, value in cfg.model.items() if value is not None}, roles, path is not None)
    method.config = Config({**cfg.to_dict(), **saved, 'model': cfg.model.to_dict()})
    if path is not None:
        advice = f'It was trained {"with" if trained.get("lora") else "without"} model.lora' if trained else ''
        _load(method, state, path, advice)
    return method


def _trained_settings(trained: dict[str, Any], path: str | None, model: dict[str, Any]) -> dict[str, Any]:
    """The settings of `model` with which a checkpoint's weights were trained, where they are others by now.

    Raises:
        ValueError: If they name a class that is not registered: unlike the config, the file may be a stranger's.
    """
    changed = {key: trained.get(key) for key in TRAINED_KEYS if trained
               and without_secrets({key: trained.get(key)}) != without_secrets({key: model.get(key)})}
    for key, value in changed.items():
        print_log(f'model.{key} is {masked({key: value})[key]!r}, as {path} was trained', 'current')
    new = {key: value for key, value in changed.items() if value is not None}
    return unmasked({**changed, **checked_types(new, path, 'config.model')}, model)


def find_checkpoint(checkpoint: str) -> str:
    """The checkpoint of a name: the file or folder itself, or the latest one of a work directory.

    Raises:
        FileNotFoundError: If the work directory has none.
    """
    if not Path(checkpoint).is_dir() or is_sharded(checkpoint) or is_weights(checkpoint):
        return checkpoint
    if Path(checkpoint, INDEX_FILE).is_file():
        raise ValueError(f'{checkpoint!r} is a pipeline, not a checkpoint: give it instead of the config, or set '
                         'model.backbone.pretrained to it')
    latest = find_latest_checkpoint(checkpoint)
    if latest is None:
        raise FileNotFoundError(f'the work directory {checkpoint!r} has no checkpoint (iter_*.pth)')
    return latest


def _read_checkpoint(checkpoint: str, roles: Collection[str]) -> tuple[str, dict[str, Any]]:
    path = find_checkpoint(checkpoint)
    if is_sharded(path):
        return path, read_whole(path, roles if tuple(roles) == STUDENT else None)
    return path, as_checkpoint(load_mapped(path), path)


def _build(model: dict[str, Any], roles: Collection[str], hollow: bool) -> DiffusionModel:
    """The method of a config, or its student alone.

    Args:
        model (dict): The config's `model`.
        roles (Collection[str]): Whose networks are needed.
        hollow (bool): Whether all weights of the student's are loaded next, so that it needs none before.
    """
    kind = model['type'] if inspect.isclass(model['type']) else MODELS.get(model['type'])
    own_way = [name for name in SAMPLING if getattr(kind, name, None) is not getattr(DiffusionModel, name, None)]
    if tuple(roles) != STUDENT or own_way or (model.get('teacher') and not hollow):  # a student starts from its teacher
        return MODELS.build(model)
    shared = inspect.signature(DiffusionModel).parameters
    settings = {name: p.default for name, p in inspect.signature(kind).parameters.items() if p.default is not p.empty}
    settings = {name: value for name, value in {**settings, **model}.items() if name in shared}
    if issubclass(kind, FlowMatching):
        settings.pop('rollout', None)  # which it leaves aside
    backbone: Backbone = MODELS.build(dict(settings.pop('backbone')))
    full = backbone.dtype in (torch.float32, torch.float64)  # otherwise diffusers may keep some weights in float32
    if hollow and full and 'lora' not in model and type(backbone).build_network is Backbone.build_network:
        backbone.build_network = lambda dtype=None: _hollow_network(backbone)
    try:
        return DiffusionModel(backbone, **settings)
    finally:
        backbone.__dict__.pop('build_network', None)


def _hollow_network(backbone: Backbone) -> nn.Module:
    """A network of the backbone's whose weights have shapes but no memory; buffers, which a checkpoint may lack, are
    there."""
    with init_empty_weights(include_buffers=False):
        network = backbone.network_class.from_config(backbone.config)
    return backbone.compile_blocks(nn.Module.to(network, backbone.dtype))


def _load(method: DiffusionModel, state: dict[str, Any], path: str, advice: str) -> None:
    """Takes over a checkpoint: the weights of the networks that the method has, the average, the iteration.

    Raises:
        ValueError: If weights are missing, left over or of another shape.
    """
    own = method.state_dict()
    weights = named_as(state['state_dict'], own, method.main_role)
    if type(method) is DiffusionModel and own.keys() & weights.keys():  # a student without the other roles
        weights = {name: w for name, w in weights.items() if hasattr(method, name.partition('.')[0])}
    weights = {name: w.to(own[name].dtype) if name in own else w for name, w in weights.items()}
    check_whole(weights, {name: tuple(w.shape) for name, w in own.items()}, path, advice)
    hollow = any(w.is_meta for w in own.values())
    average = StudentEMA(method.student) if 'student_ema' in state else None  # without memory if the student is
    method.load_state_dict(weights, assign=hollow)
    if average is not None:
        average.load_state_dict(state['student_ema'])
        if hollow:
            average.weights = {name: full_precision(w) for name, w in state['student_ema']['weights'].items()}
        method.student_ema = average
    done = state.get('meta', {}).get('iter')
    method.iteration = None if not done else done - 1  # as training left it


def _give_encoders(backbone: dict[str, Any]) -> None:
    """Puts the text encoders that made a cache in the place of the conditioner that only reads it."""
    conditioner = backbone.get('conditioner') or {}
    if not is_type(conditioner, EmbeddingConditioner, MODELS):
        return
    index = read_index(Path(conditioner['folder'])) if Path(conditioner['folder']).is_dir() else None
    where = Path(conditioner['folder'], INDEX)
    backbone['conditioner'] = unmasked(checked_types(index['encoder'], where, 'encoder')) if index else None


def student_weights(method: DiffusionModel, ema: bool) -> contextlib.AbstractContextManager:
    """Context in which the student carries its EMA weights, if wanted and there are any."""
    return method.student_ema.applied() if ema and method.student_ema is not None else contextlib.nullcontext()


@torch.no_grad()
def sample_prompts(method: DiffusionModel, prompts: list[Any], noise: Tensor, batch_size: int = 250,
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


def sample_files(method: DiffusionModel, prompts: list[Any], folder: Path, seed: int, batch_size: int,
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
