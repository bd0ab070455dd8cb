"""Writes a trained student as files that others open: a diffusers pipeline, a LoRA file, or a network."""
import contextlib
import inspect
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from huggingface_hub import snapshot_download
from mmengine.config import Config
from mmengine.registry import MODELS
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cdm_plugin.assets import ROOT, SCHEME
from cdm_plugin.backbones import Backbone
from cdm_plugin.backbones.parts import PARTS_FILE
from cdm_plugin.conditioners import Conditioner, EmbeddingConditioner
from cdm_plugin.data.embeddings.files import INDEX, read_index
from cdm_plugin.draws import randomness_kept, stream
from cdm_plugin.export.card import model_card
from cdm_plugin.export.job import (
    CARD_FILE,
    FLOAT8,
    INDEX_FILE,
    ExportJob,
    checked_dtype,
    is_whole_pipeline,
    missing_t5,
    name_of,
)
from cdm_plugin.export.recipe import describe_recipe, how_to_sample, is_distilled
from cdm_plugin.export.sd_scripts import SD_SCRIPTS_FILE, sd_scripts_lora
from cdm_plugin.export.staging import staged, was_interrupted
from cdm_plugin.export.weights import exported_network
from cdm_plugin.files import inside
from cdm_plugin.methods import DiffusionModel
from cdm_plugin.pretrained import absolute_folder
from cdm_plugin.registry import checked_types, registered
from cdm_plugin.roles.ema import check_finite
from cdm_plugin.roles.lora import PREFIX, save_lora
from cdm_plugin.roles.weights import unwrap
from cdm_plugin.secrets import is_secret, masked
from cdm_plugin.sheets import save_pngs

SAMPLES = 'samples'
# Formats that may execute code when they are opened.
PICKLES = ('.bin', '.pt', '.pth', '.pkl', '.pickle', '.ckpt')
# What says where a part of a pipeline comes from rather than how it is used.
ORIGIN_KEYS = ('type', 'pretrained', 'subfolder', 'revision', 'variant')


def export(method: DiffusionModel, folder: str | Path, ema: bool = True, dtype: str | None = None,
           fuse: bool = False, config: None | Config | Mapping[str, Any] = None,
           prompts: list[Any] | None = None, iterations: int | None = None, sd_scripts: bool = False) -> Path:
    """Writes the student as a folder, safetensors only. The method stays as it is, random numbers included.

    - Distilled from a whole pipeline: a pipeline of diffusers, which needs nothing of this package.
    - Adapters of a base (`model.lora`): `pytorch_lora_weights.safetensors`, to be used with the base; with `fuse`,
      a whole pipeline.
    - Class-conditional or pixel-space: the network in diffusers' layout.

    `cdm_plugin.inference.load_method(folder)` opens all of them, `backbone.pretrained=folder` those with whole
    weights. Each has a model card, README.md. An earlier export in the folder is replaced, once the new one
    is complete; if that is interrupted, the next export begins by putting the earlier one back.

    Args:
        method (DiffusionModel): The trained method.
        folder (str): Where to; made if need be.
        ema (bool): Whether to write the EMA weights (the student's own if there are none). Default True.
        dtype (str, optional): Of the weights in the files, 'float32', 'bfloat16' or 'float8': the network's linear
            layers in float8_e4m3fn, as diffusers' layerwise casting keeps them, the rest in bfloat16. Default: the
            network's own, and float32 with `fuse`, because bfloat16 rounds small adapters away.
        fuse (bool): Whether to add the adapters to the weights of the base. Default False.
        config (Config, optional): The training config, for the model card (without its tokens and folders).
        prompts (list, optional): Texts or class labels; an image of each goes into `samples/` and the card.
        iterations (int, optional): How long the student was trained, for the card. Default: what the method knows.
        sd_scripts (bool): Whether to write a LoRA file as sd-scripts names it too, `sd_scripts_lora.safetensors`.
            Default False.

    Returns:
        Path: The folder.

    Raises:
        ValueError: If it cannot be written so, see `check_export`, or has weights that are not finite.
    """
    check_export(method, folder, dtype, fuse, sd_scripts)
    check_finite(method, ema, 'the student')
    if iterations is None and method.iteration is not None:
        iterations = method.iteration + 1
    if config is not None:
        config = Config(_publishable(masked(config.to_dict() if isinstance(config, Config) else dict(config))))
    job = ExportJob(method, ema and method.student_ema is not None, checked_dtype(dtype), fuse, config, iterations,
                    sd_scripts)
    with randomness_kept(), staged(Path(folder), _own_names(job.backbone)) as staging:
        text_config, conditioner = _text_config(job), None
        if job.as_lora:
            _write_lora(job, staging, text_config)
        elif is_whole_pipeline(job.backbone):
            conditioner = _write_pipeline(job, staging, text_config)
        else:
            job.backbone.save_pretrained(exported_network(job), staging, **_recipe(job))
        samples = _draw(job, staging, prompts, conditioner or text_config)
        model_card(job, staging, text_config, prompts, samples).save(staging / CARD_FILE)
        _finish(staging)
    return Path(folder)


def check_export(method: DiffusionModel, folder: str | Path, dtype: str | None = None,
                 fuse: bool = False, sd_scripts: bool = False) -> None:
    """Finds what `export` would fail on, before anything is trained or written.

    Raises:
        ValueError: If `dtype` is unknown, or float8 for a LoRA file, `fuse` has no adapters, `sd_scripts` no LoRA file
            that it could read, the base of the adapters has random weights, or the folder holds the model that the
            student was made from or files of somebody else's.
    """
    if checked_dtype(dtype) == FLOAT8 and method.lora is not None and not fuse:
        raise ValueError("dtype='float8' is for whole weights, but this export is a LoRA file: give fuse=True (--fuse) "
                         "too, or dtype='bfloat16'")
    backbone, folder = method.backbone, Path(folder)
    if sd_scripts and (method.lora is None or fuse or not backbone.sd_scripts_layers):
        what = 'whole weights' if method.lora is None or fuse else f'of a {type(backbone).__name__}'
        raise ValueError('sd_scripts=True (--sd-scripts) writes LoRA files of models that sd-scripts knows, '
                         f'but this export is {what}')
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


def _own_names(backbone: Backbone) -> list[str]:
    """Everything that an export may write at the top of its folder."""
    names = [PARTS_FILE, INDEX_FILE, CARD_FILE, SAMPLES, LORA_WEIGHT_NAME_SAFE, SD_SCRIPTS_FILE, 'transformer',
             'scheduler', 'vae']
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
def _quiet_diffusers() -> Iterator[None]:
    verbosity = diffusers.logging.get_verbosity()
    diffusers.logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers.logging.set_verbosity(verbosity)


def _recipe(job: ExportJob) -> dict[str, Any]:
    return dict(image_size=job.image_size, sample_sigmas=how_to_sample(job)[0].tolist(), rollout=job.method.rollout,
                recipe=describe_recipe(job))


# Whole weights


def _write_pipeline(job: ExportJob, staging: Path, text_config: dict[str, Any]) -> Conditioner:
    """Writes the pipeline, and returns its text encoders."""
    backbone, dtype = job.backbone, name_of(job.target_dtype)
    index = dict(backbone.pipeline_class().load_config(backbone.pretrained, **backbone._hub_kwargs))
    codec = _in_dtype(backbone, backbone.codec, backbone.codec.to_config(), dtype)
    conditioner = _in_dtype(backbone, backbone.conditioner, text_config, dtype)
    components = dict(conditioner.pipeline.components, transformer=exported_network(job),
                      scheduler=backbone.scheduler_for(job.method.rollout), vae=codec.vae)
    settings = {name: index[name] for name in inspect.signature(backbone.pipeline_class().__init__).parameters
                if name in index and name not in components}  # plain data, which layers of a text encoder are taken
    if is_distilled(job):
        settings.update(backbone.distilled_settings())
    pipeline = backbone.pipeline_class()(**components, **settings)
    with _quiet_diffusers():  # it warns of every part that is None, on purpose
        pipeline.save_pretrained(staging, safe_serialization=True)
    _copy_processors(backbone, index, pipeline, staging)
    backbone.save_pretrained(
        None, staging, **_recipe(job), conditioner=_part_entry(text_config, backbone.conditioner_type),
        codec=_part_entry(backbone.codec.to_config(), backbone.codec_type))
    return conditioner


def _in_dtype(backbone: Backbone, part: Any, config: dict[str, Any], dtype: str) -> Any:
    """A part of the pipeline in a dtype: the one that is there if it fits, otherwise loaded again."""
    if part.to_config() == config and config.get('dtype', 'float32') == dtype:
        return part
    return MODELS.build({**_access(backbone), **config, 'dtype': dtype})


def _access(backbone: Backbone) -> dict[str, Any]:
    """Those of from_pretrained's arguments that say how to reach files, rather than which."""
    return {k: v for k, v in backbone.load_kwargs.items() if k not in ('revision', 'variant', 'force_download')}


def _copy_processors(backbone: Backbone, index: dict[str, Any], pipeline: Any, staging: Path) -> None:
    """Takes over what a pipeline's source has besides models and tokenizers, without opening it: processors cannot be
    loaded where torchvision is not installed, and encoding texts takes none, or its tokenizer alone."""
    names = [name for name, entry in index.items() if isinstance(entry, (list, tuple)) and name in pipeline.components
             and str(entry[-1]).endswith('Processor') and type(getattr(pipeline, name)).__name__ != entry[-1]]
    if not names:
        return
    source = Path(backbone.pretrained)
    if not source.is_dir():
        source = Path(snapshot_download(backbone.pretrained, allow_patterns=[f'{name}/*' for name in names],
                                        **backbone._hub_kwargs))
    written = json.loads((staging / INDEX_FILE).read_text())
    for name in names:
        for file in (source / name).rglob('*'):  # a link that leads out would publish what it leads to
            inside(source, str(file.relative_to(source)), source)
        shutil.copytree(source / name, staging / name, dirs_exist_ok=True,
                        ignore=shutil.ignore_patterns(*(f'*{suffix}' for suffix in PICKLES)))
        written[name] = list(index[name])
    (staging / INDEX_FILE).write_text(json.dumps(written, indent=2) + '\n')


def _forget_origin(file: Path) -> None:
    """Takes the source's path on this machine out of a config that diffusers or transformers wrote."""
    content = json.loads(file.read_text())
    if isinstance(content, dict) and any(content.pop(key, None) for key in ('_name_or_path', 'name_or_path')):
        file.write_text(json.dumps(content, indent=2) + '\n')


def _part_entry(config: dict[str, Any], default_type: str, source: str | None = None) -> dict[str, Any]:
    """What cdm_parts.json says of a conditioner or codec: what differs from that of the folder (or of `source`)."""
    kinds = registered(config['type'], MODELS).__mro__
    parameters = {name: p.default for cls in reversed(kinds) if '__init__' in vars(cls)
                  for name, p in inspect.signature(cls.__init__).parameters.items()}
    own = {key: value for key, value in config.items() if key not in ORIGIN_KEYS and parameters.get(key) != value}
    if source is not None and absolute_folder(config['pretrained']) != absolute_folder(source):
        return config
    if config['type'] != default_type:
        return dict(own, type=config['type'], pretrained=source or '.')
    return own


def _text_config(job: ExportJob) -> dict[str, Any]:
    """Config of the conditioner with the text encoders that the student was trained with."""
    backbone = job.backbone
    config = backbone.conditioner.to_config()
    if config is not None or not is_whole_pipeline(backbone):
        return config or {}
    config = backbone.default_parts()['conditioner']
    config = {k: v for k, v in config.items() if k not in ('force_download', *_access(backbone))}
    index = backbone.pipeline_class().load_config(backbone.pretrained, **backbone._hub_kwargs)
    return {**config, **missing_t5(index), **_cached_arguments(job, config['type'])}


def _cached_arguments(job: ExportJob, kind: str) -> dict[str, Any]:
    """How the encoders were used that `cdm cache` made the embeddings with, if that is known."""
    folder = getattr(job.backbone.conditioner, 'folder', None)
    index = read_index(Path(folder)) if folder is not None and Path(folder).is_dir() else None
    encoder = (index or {}).get('encoder', {})
    if encoder.get('type') != kind:
        return {}
    encoder = checked_types(encoder, Path(folder, INDEX), 'encoder')
    return {key: value for key, value in encoder.items() if key not in (*ORIGIN_KEYS, 'dtype')}


# LoRA


def _write_lora(job: ExportJob, staging: Path, text_config: dict[str, Any]) -> None:
    backbone, lora = job.backbone, job.method.lora
    with job.weights():
        file = save_lora(unwrap(job.method.student), str(staging))
    if job.dtype is not None:
        with safe_open(file, 'pt') as content:
            weights = {name: content.get_tensor(name).to(job.dtype) for name in content.keys()}
            metadata = content.metadata()
        save_file(weights, file, metadata)
    if job.sd_scripts:
        save_file(sd_scripts_lora({name.removeprefix(f'{PREFIX}.'): w for name, w in load_file(file).items()},
                                  job.method.base, backbone.sd_scripts_layers), staging / SD_SCRIPTS_FILE,
                  dict(format='pt'))
    settings: dict[str, Any] = dict(rank=lora.rank, alpha=lora.alpha)
    if lora.target_modules is not None:
        settings['target_modules'] = list(lora.target_modules)
    entries = dict(conditioner=text_config or None, codec=backbone.codec.to_config())
    if is_whole_pipeline(backbone):
        entries = dict(conditioner=_part_entry(text_config, backbone.conditioner_type, backbone.pretrained),
                       codec=_part_entry(backbone.codec.to_config(), backbone.codec_type, backbone.pretrained))
    backbone.save_pretrained(None, staging, **_recipe(job), **entries, base=_base(backbone), lora=settings)


def _base(backbone: Backbone) -> dict[str, Any]:
    """Arguments that build the backbone of the adapters' base again."""
    pretrained = absolute_folder(backbone.pretrained)
    if Path(pretrained).is_dir() and ROOT.resolve() in Path(pretrained).parents:
        pretrained = SCHEME + Path(pretrained).relative_to(ROOT.resolve()).as_posix()
    base = dict(pretrained=pretrained, dtype=name_of(backbone.dtype),
                **{k: v for k, v in backbone.load_kwargs.items() if not is_secret(k, v) and k != 'force_download'})
    if backbone.subfolder != 'transformer':
        base['subfolder'] = backbone.subfolder
    for name, parameter in inspect.signature(type(backbone).__init__).parameters.items():  # the architecture's own
        if parameter.kind is parameter.KEYWORD_ONLY and hasattr(backbone, name):
            base.setdefault(name, getattr(backbone, name))
    return base


# Samples


def _draw(job: ExportJob, staging: Path, prompts: list[Any] | None,
          text: None | Conditioner | dict[str, Any] = None) -> list[str]:
    """Draws an image of each prompt with the exported weights, and returns the files' names."""
    if not prompts:
        return []
    method, conditioner = job.method, job.backbone.conditioner
    if isinstance(conditioner, EmbeddingConditioner) and text:  # the embeddings were computed before
        conditioner = MODELS.build({**_access(job.backbone), **text}) if isinstance(text, dict) else text
    sigmas, guidance = how_to_sample(job)
    names, noise = [], torch.randn(method.latent_shape(len(prompts)), generator=stream(0, 'sample'))
    with job.weights():
        for i, prompt in enumerate(prompts):
            condition = conditioner.encode([prompt])
            job.backbone.check_condition(condition)
            images = method.sample(condition, noise[i:i + 1], sigmas=sigmas, guidance_scale=guidance)
            save_pngs(images, staging / SAMPLES, [f'{i:04d}'])
            names.append(f'{SAMPLES}/{i:04d}.png')
    return names


def _publishable(value: Any) -> Any:
    """A config without where things lie on this machine."""
    if isinstance(value, Mapping):
        return {key: _publishable(child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_publishable(child) for child in value)
    if isinstance(value, (str, Path)) and _is_local_path(str(value)):
        return f'.../{Path(value).name}'
    return value


def _is_local_path(text: str) -> bool:
    """Whether it is an absolute path of this machine; what it ends with may be gone, or still to come."""
    path = Path(text)
    return path.is_absolute() and any(os.path.exists(p) for p in (path, *path.parents) if p != p.parent)
