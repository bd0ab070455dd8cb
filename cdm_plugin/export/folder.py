"""Writes a trained student as files that others open: a diffusers pipeline, a LoRA file, or a network."""
import contextlib
import copy
import inspect
import json
import os
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional, Union

import diffusers
import numpy as np
import torch
from diffusers import ModelMixin
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from huggingface_hub import snapshot_download
from mmengine.config import Config
from mmengine.registry import MODELS
from safetensors import safe_open
from safetensors.torch import save_file

from cdm_plugin.assets import ROOT, SCHEME
from cdm_plugin.backbones import Backbone
from cdm_plugin.backbones.base import PARTS_FILE
from cdm_plugin.conditioners import Conditioner, EmbeddingConditioner, absolute_folder
from cdm_plugin.data.embedding_files import read_index
from cdm_plugin.draws import stream
from cdm_plugin.export.card import model_card
from cdm_plugin.export.job import (CARD_FILE, INDEX_FILE, ExportJob, checked_dtype, is_whole_pipeline, missing_t5,
                                   name_of)
from cdm_plugin.export.recipe import describe_recipe
from cdm_plugin.export.staging import staged, was_interrupted
from cdm_plugin.images import save_pngs
from cdm_plugin.lora import PREFIX, save_lora
from cdm_plugin.methods import DiffusionModel
from cdm_plugin.networks import unwrap

SAMPLES = 'samples'
# Formats that may execute code when they are opened.
PICKLES = ('.bin', '.pt', '.pth', '.pkl', '.pickle', '.ckpt')
# What says where a part of a pipeline comes from rather than how it is used.
ORIGIN_KEYS = ('type', 'pretrained', 'subfolder', 'revision', 'variant')
SECRETS = ('token', 'use_auth_token', 'api_key', 'password', 'secret')


def export(method: DiffusionModel, folder: Union[str, Path], ema: bool = True, dtype: Optional[str] = None,
           fuse: bool = False, config: Union[None, Config, Mapping[str, Any]] = None,
           prompts: Optional[List[Any]] = None, iterations: Optional[int] = None) -> Path:
    """Writes the student as a folder, safetensors only. The method stays as it is, random numbers included.

    - Distilled from a whole pipeline: a pipeline of diffusers, which needs nothing of this package.
    - Adapters of a base (`model.lora`): `pytorch_lora_weights.safetensors`, to be used with the base; with `fuse`,
      a whole pipeline.
    - Class-conditional or pixel-space: the network in diffusers' layout.

    `cdm_plugin.inference.load_method(folder)` opens all of them, `backbone.pretrained=folder` those with whole
    weights. The first two have a model card, README.md. An earlier export in the folder is replaced, once the new one
    is complete; if that is interrupted, the next export begins by putting the earlier one back.

    Args:
        method (DiffusionModel): The trained method.
        folder (str): Where to; made if need be.
        ema (bool): Whether to write the EMA weights (the student's own if there are none). Default True.
        dtype (str, optional): Of the weights in the files, 'float32' or 'bfloat16'. Default: the network's own, and
            float32 with `fuse`, because bfloat16 rounds small adapters away.
        fuse (bool): Whether to add the adapters to the weights of the base. Default False.
        config (Config, optional): The training config, for the model card (without its tokens and folders).
        prompts (list, optional): Texts or class labels; an image of each goes into `samples/` and the card.
        iterations (int, optional): How long the student was trained, for the card. Default: what the method knows.

    Returns:
        Path: The folder.

    Raises:
        ValueError: If it cannot be written so, see `check_export`.
    """
    check_export(method, folder, dtype, fuse)
    if iterations is None and method.iteration is not None:
        iterations = method.iteration + 1
    if config is not None:
        config = Config(_publishable(config.to_dict() if isinstance(config, Config) else dict(config)))
    job = ExportJob(method, ema and method.student_ema is not None, checked_dtype(dtype), fuse, config, iterations)
    with _randomness_kept(), staged(Path(folder), _own_names(job.backbone)) as staging:
        if not job.as_lora and not is_whole_pipeline(job.backbone):
            _write_network(job, staging)
            _draw(job, staging, prompts)
        else:
            text_config = _text_config(job)
            write = _write_lora if job.as_lora else _write_pipeline
            conditioner = write(job, staging, text_config)
            samples = _draw(job, staging, prompts, conditioner or text_config)
            model_card(job, staging, text_config, prompts, samples).save(staging / CARD_FILE)
        _finish(staging)
    return Path(folder)


def check_export(method: DiffusionModel, folder: Union[str, Path], dtype: Optional[str] = None,
                 fuse: bool = False) -> None:
    """Finds what `export` would fail on, before anything is trained or written.

    Raises:
        ValueError: If `dtype` is unknown, `fuse` has no adapters, the base of the adapters has random weights, or the
            folder holds the model that the student was made from or files of somebody else's.
    """
    checked_dtype(dtype)
    backbone, folder = method.backbone, Path(folder)
    if fuse and method.lora is None:
        raise ValueError('fuse=True adds the adapters of model.lora to the weights, but this model has none')
    if method.lora is not None and backbone.pretrained is None:
        raise ValueError('the adapters of model.lora cannot be exported: their base has new random weights '
                         '(model.backbone.config without pretrained), which no file holds')
    if backbone.pretrained is not None and Path(backbone.pretrained).is_dir():
        source = Path(backbone.pretrained).resolve()
        if folder.resolve() in (source, *source.parents):
            raise ValueError(f'the export folder {str(folder)!r} holds the model that the student was made from '
                             f'({backbone.pretrained!r}): give another folder')
    if folder.exists() and not folder.is_dir():
        raise ValueError(f'the export folder {str(folder)!r} is a file')
    taken = sorted(name for name in _own_names(backbone) if (folder / name).exists())
    if taken and not (folder / PARTS_FILE).is_file() and not was_interrupted(folder):
        raise ValueError(f'the export folder {str(folder)!r} has {", ".join(taken[:3])} that `cdm export` did not '
                         'write: give another folder')


# The folder


def _own_names(backbone: Backbone) -> List[str]:
    """Everything that an export may write at the top of its folder."""
    names = [PARTS_FILE, INDEX_FILE, CARD_FILE, SAMPLES, LORA_WEIGHT_NAME_SAFE, 'transformer', 'scheduler', 'vae']
    if is_whole_pipeline(backbone):
        names += inspect.signature(backbone.pipeline_class().__init__).parameters
    return list(dict.fromkeys(name for name in names if name != 'self'))


def _finish(staging: Path) -> None:
    """Takes out what diffusers and transformers should not have written."""
    for file in staging.rglob('*.json'):
        _forget_origin(file)
    pickles = [str(p.relative_to(staging)) for p in staging.rglob('*') if p.suffix in PICKLES]
    if pickles:
        raise RuntimeError(f'an export must be safetensors only, but it would have {pickles[:3]}')


@contextlib.contextmanager
def _randomness_kept() -> Iterator[None]:
    """Random numbers go on after it as if nothing had been drawn inside."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextlib.contextmanager
def _quiet_diffusers() -> Iterator[None]:
    verbosity = diffusers.logging.get_verbosity()
    diffusers.logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers.logging.set_verbosity(verbosity)


def _recipe(job: ExportJob) -> Dict[str, Any]:
    return dict(image_size=job.image_size, sample_sigmas=job.method.sample_sigmas.tolist(),
                recipe=describe_recipe(job))


# Whole weights


def _write_network(job: ExportJob, staging: Path) -> None:
    job.backbone.save_pretrained(_network(job), staging, **_recipe(job))


def _write_pipeline(job: ExportJob, staging: Path, text_config: Dict[str, Any]) -> Conditioner:
    """Writes the pipeline, and returns its text encoders."""
    backbone, dtype = job.backbone, name_of(job.target_dtype)
    index = dict(backbone.pipeline_class().load_config(backbone.pretrained, **backbone._hub_kwargs))
    codec = _in_dtype(backbone, backbone.codec, backbone.codec.to_config(), dtype)
    conditioner = _in_dtype(backbone, backbone.conditioner, text_config, dtype)
    components = dict(conditioner.pipeline.components, transformer=_network(job), scheduler=backbone.scheduler,
                      vae=codec.vae)
    pipeline = backbone.pipeline_class()(**components)
    with _quiet_diffusers():  # it warns of every part that is None, on purpose
        pipeline.save_pretrained(staging, safe_serialization=True)
    _copy_processors(backbone, index, pipeline, staging)
    backbone.save_pretrained(
        None, staging, **_recipe(job), conditioner=_part_entry(text_config, backbone.conditioner_type),
        codec=_part_entry(backbone.codec.to_config(), 'VAECodec'))
    return conditioner


def _in_dtype(backbone: Backbone, part: Any, config: Dict[str, Any], dtype: str) -> Any:
    """A part of the pipeline in a dtype: the one that is there if it fits, otherwise loaded again."""
    if part.to_config() == config and config.get('dtype', 'float32') == dtype:
        return part
    return MODELS.build({**_access(backbone), **config, 'dtype': dtype})


def _access(backbone: Backbone) -> Dict[str, Any]:
    """Those of from_pretrained's arguments that say how to reach files, rather than which."""
    return {k: v for k, v in backbone.load_kwargs.items() if k not in ('revision', 'variant', 'force_download')}


def _network(job: ExportJob) -> ModelMixin:
    """The student on the CPU with the weights that are exported, apart from the method's own."""
    if job.method.lora is not None:
        return _fused(job)
    student = unwrap(job.method.student)
    weights = student.state_dict()
    average = job.method.student_ema.weights if job.ema else {}
    with torch.device('meta'):
        network = type(student).from_config(student.config)
    network.load_state_dict(
        {name: _cast(average.get(name, w).detach().to('cpu', w.dtype), job.dtype) for name, w in weights.items()},
        assign=True)
    return network


def _cast(tensor: torch.Tensor, dtype: Optional[torch.dtype]) -> torch.Tensor:
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def _fused(job: ExportJob) -> ModelMixin:
    """A fresh network with the adapters added to its weights, by diffusers itself."""
    backbone = copy.copy(job.backbone)
    backbone.compile, backbone.quantization = False, None
    wide = job.backbone.dtype if job.backbone.dtype == torch.float64 else torch.float32
    network = backbone.build_network().to(wide)  # the base as it was trained with; the sum is rounded once
    with tempfile.TemporaryDirectory() as folder:
        with job.weights():
            save_lora(unwrap(job.method.student), folder)
        network.load_lora_adapter(folder, prefix=PREFIX, use_safetensors=True)
    network.fuse_lora(safe_fusing=True)
    network.unload_lora()
    return network if network.dtype == job.target_dtype else network.to(job.target_dtype)


def _copy_processors(backbone: Backbone, index: Dict[str, Any], pipeline: Any, staging: Path) -> None:
    """Takes over what a pipeline's source has besides models and tokenizers, without opening it: LongCat-Image's text
    processor rewrites prompts, and cannot be loaded where torchvision is not installed."""
    names = [name for name, entry in index.items() if isinstance(entry, (list, tuple)) and name in pipeline.components
             and str(entry[-1]).endswith('Processor') and getattr(pipeline, name) is None]
    if not names:
        return
    source = Path(backbone.pretrained)
    if not source.is_dir():
        source = Path(snapshot_download(backbone.pretrained, allow_patterns=[f'{name}/*' for name in names],
                                        **backbone._hub_kwargs))
    written = json.loads((staging / INDEX_FILE).read_text())
    for name in names:
        shutil.copytree(source / name, staging / name,
                        ignore=shutil.ignore_patterns(*(f'*{suffix}' for suffix in PICKLES)))
        written[name] = list(index[name])
    (staging / INDEX_FILE).write_text(json.dumps(written, indent=2) + '\n')


def _forget_origin(file: Path) -> None:
    """Takes the source's path on this machine out of a config that diffusers or transformers wrote."""
    content = json.loads(file.read_text())
    if isinstance(content, dict) and any(content.pop(key, None) for key in ('_name_or_path', 'name_or_path')):
        file.write_text(json.dumps(content, indent=2) + '\n')


def _part_entry(config: Dict[str, Any], default_type: str, source: Optional[str] = None) -> Dict[str, Any]:
    """What cdm_parts.json says of a conditioner or codec: what differs from that of the folder (or of `source`)."""
    parameters = {name: p.default for cls in reversed(MODELS.get(config['type']).__mro__) if '__init__' in vars(cls)
                  for name, p in inspect.signature(cls.__init__).parameters.items()}
    own = {key: value for key, value in config.items() if key not in ORIGIN_KEYS and parameters.get(key) != value}
    if source is not None and absolute_folder(config['pretrained']) != absolute_folder(source):
        return config
    if config['type'] != default_type:
        return dict(own, type=config['type'], pretrained=source or '.')
    return own


def _text_config(job: ExportJob) -> Dict[str, Any]:
    """Config of the conditioner with the text encoders that the student was trained with."""
    backbone = job.backbone
    config = backbone.conditioner.to_config()
    if config is not None or not is_whole_pipeline(backbone):
        return config or {}
    config = backbone.default_parts()['conditioner']
    config = {k: v for k, v in config.items() if k not in ('force_download', *_access(backbone))}
    index = backbone.pipeline_class().load_config(backbone.pretrained, **backbone._hub_kwargs)
    return {**config, **missing_t5(index), **_cached_arguments(job, config['type'])}


def _cached_arguments(job: ExportJob, kind: str) -> Dict[str, Any]:
    """How the encoders were used that `cdm cache` made the embeddings with, if that is known."""
    folder = getattr(job.backbone.conditioner, 'folder', None)
    index = read_index(Path(folder)) if folder is not None and Path(folder).is_dir() else None
    encoder = (index or {}).get('encoder', {})
    if encoder.get('type') != kind:
        return {}
    return {key: value for key, value in encoder.items() if key not in (*ORIGIN_KEYS, 'dtype')}


# LoRA


def _write_lora(job: ExportJob, staging: Path, text_config: Dict[str, Any]) -> None:
    backbone, lora = job.backbone, job.method.lora
    with job.weights():
        file = save_lora(unwrap(job.method.student), str(staging))
    if job.dtype is not None:
        with safe_open(file, 'pt') as content:
            weights = {name: content.get_tensor(name).to(job.dtype) for name in content.keys()}
            metadata = content.metadata()
        save_file(weights, file, metadata)
    settings = dict(rank=lora.rank, alpha=lora.alpha)
    if lora.target_modules is not None:
        settings['target_modules'] = list(lora.target_modules)
    entries = dict(conditioner=text_config or None, codec=backbone.codec.to_config())
    if is_whole_pipeline(backbone):
        entries = dict(conditioner=_part_entry(text_config, backbone.conditioner_type, backbone.pretrained),
                       codec=_part_entry(backbone.codec.to_config(), 'VAECodec', backbone.pretrained))
    backbone.save_pretrained(None, staging, **_recipe(job), **entries, base=_base(backbone), lora=settings)


def _base(backbone: Backbone) -> Dict[str, Any]:
    """Arguments that build the backbone of the adapters' base again."""
    pretrained = absolute_folder(backbone.pretrained)
    if Path(pretrained).is_dir() and ROOT.resolve() in Path(pretrained).parents:
        pretrained = SCHEME + Path(pretrained).relative_to(ROOT.resolve()).as_posix()
    base = dict(pretrained=pretrained, dtype=name_of(backbone.dtype),
                **{k: v for k, v in backbone.load_kwargs.items() if k not in ('token', 'force_download')})
    if backbone.subfolder != 'transformer':
        base['subfolder'] = backbone.subfolder
    for name, parameter in inspect.signature(type(backbone).__init__).parameters.items():  # the architecture's own
        if parameter.kind is parameter.KEYWORD_ONLY and hasattr(backbone, name):
            base.setdefault(name, getattr(backbone, name))
    return base


# Samples


def _draw(job: ExportJob, staging: Path, prompts: Optional[List[Any]],
          text: Union[None, Conditioner, Dict[str, Any]] = None) -> List[str]:
    """Draws an image of each prompt with the exported weights, and returns the files' names."""
    if not prompts:
        return []
    method, conditioner = job.method, job.backbone.conditioner
    if isinstance(conditioner, EmbeddingConditioner) and text:  # the embeddings were computed before
        conditioner = MODELS.build({**_access(job.backbone), **text}) if isinstance(text, dict) else text
    names, noise = [], torch.randn(method.latent_shape(len(prompts)), generator=stream(0, 'sample'))
    with job.weights():
        for i, prompt in enumerate(prompts):
            condition = conditioner.encode([prompt])
            job.backbone.check_condition(condition)
            save_pngs(method.sample(condition, noise[i:i + 1]), staging / SAMPLES, [f'{i:04d}'])
            names.append(f'{SAMPLES}/{i:04d}.png')
    return names


def _publishable(value: Any) -> Any:
    """A config without its tokens, and without where things lie on this machine."""
    if isinstance(value, Mapping):
        return {key: '***' if key in SECRETS and isinstance(child, str) else _publishable(child)
                for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_publishable(child) for child in value)
    if isinstance(value, (str, Path)) and _is_local_path(str(value)):
        return f'.../{Path(value).name}'
    return value


def _is_local_path(text: str) -> bool:
    """Whether it is an absolute path of this machine; what it ends with may be gone, or still to come."""
    path = Path(text)
    return path.is_absolute() and any(os.path.exists(p) for p in (path, *path.parents) if p != p.parent)
