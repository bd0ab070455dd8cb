"""The model card of an export."""
import importlib.metadata
import inspect
import re
import shutil
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Tuple

import torch
from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache
from yaml import YAMLError

from cdm_plugin.backbones import Backbone
from cdm_plugin.conditioners import absolute_folder
from cdm_plugin.export.job import CARD_FILE, ExportJob, is_whole_pipeline, name_of
from cdm_plugin.lora import PREFIX
from cdm_plugin.methods import FlowMatching
from cdm_plugin.version import __version__

DEFAULT_PROMPT = 'a red fox in the snow'


def model_card(job: ExportJob, staging: Path, text_config: Dict[str, Any], prompts: Optional[List[Any]],
                samples: List[str]) -> ModelCard:
    backbone, method = job.backbone, job.method
    metadata, base_folder = _read_base_card(backbone)
    licence = {key: metadata[key] for key in ('license', 'license_name', 'license_link') if metadata.get(key)}
    hub_id, steps = _hub_id(backbone), len(method.sample_sigmas)
    shown = hub_id or Path(backbone.pretrained).name
    data = ModelCardData(
        base_model=hub_id, library_name='diffusers',
        pipeline_tag='text-to-image' if is_whole_pipeline(backbone) else None,
        tags=['cdm', 'distillation', 'few-step', type(method).__name__.lower(), *(['lora'] if job.as_lora else [])],
        **_licence_fields(licence, hub_id, base_folder, staging))
    distilled = 'trained' if isinstance(method, FlowMatching) else 'distilled'
    what = 'A LoRA adapter' if job.as_lora else 'A model'
    sections = [
        f'# {shown}, {steps} steps',
        f'{what} of {shown}, {distilled} to make images in {steps} steps, {job.image_size[1]}x{job.image_size[0]} '
        'pixels. Written by cdm_plugin.',
        '## How to use', _usage(job, text_config, prompts)]
    if samples:
        shown_prompts = [re.sub(r'[\[\]\s]+', ' ', str(prompt)).strip() for prompt in prompts]
        images = [f'{prompt}\n\n![{prompt}]({name})' for prompt, name in zip(shown_prompts, samples)]
        sections += ['## Samples', f'{steps} steps, first images drawn:', *images]
    found = f'`{licence["license"]}`' if 'license' in licence else 'see its page or folder'
    sections += ['## Recipe', _table(_describe_recipe(job)), '## Licence',
                 f'The licence of the base model, {shown}, applies: {found}.', '## Versions', _table(_versions())]
    if job.config is not None:
        sections += ['## Config', f'<details><summary>The whole training config</summary>\n\n````python\n'
                                  f'{job.config.pretty_text.strip()}\n````\n\n</details>']
    text = '\n\n'.join(sections)
    return ModelCard(f'---\n{data.to_yaml()}\n---\n\n{text}\n')


def _hub_id(backbone: Backbone) -> Optional[str]:
    """The base's name on the hub, if it has one."""
    if not Path(backbone.pretrained).is_dir():
        return backbone.pretrained
    cached = [part for part in Path(absolute_folder(backbone.pretrained)).parts if part.startswith('models--')]
    return cached[-1].removeprefix('models--').replace('--', '/') if cached else None


def _read_base_card(backbone: Backbone) -> Tuple[Dict[str, Any], Optional[Path]]:
    """Metadata of the base's own model card, and its folder; of a hub model only if it is on this machine."""
    path: Any = Path(backbone.pretrained, CARD_FILE)
    if not Path(backbone.pretrained).is_dir():
        path = try_to_load_from_cache(backbone.pretrained, CARD_FILE, cache_dir=backbone.load_kwargs.get('cache_dir'),
                                      revision=backbone.load_kwargs.get('revision'))
    if not isinstance(path, (str, Path)) or not Path(path).is_file():
        return {}, None
    try:
        return ModelCard.load(path, ignore_metadata_errors=True).data.to_dict(), Path(path).parent
    except (ValueError, YAMLError):
        return {}, None


def _licence_fields(licence: Dict[str, Any], hub_id: Optional[str], base_folder: Optional[Path],
                    staging: Path) -> Dict[str, Any]:
    """The card's licence; a file that it names by a relative path is copied, or linked where the base has it."""
    licence = dict(licence or dict(license='other'))
    link = str(licence.get('license_link', ''))
    if link and '://' not in link:
        file = None if base_folder is None else base_folder / link
        if file is not None and file.is_file() and Path(link).name == link:
            shutil.copyfile(file, staging / link)
        elif hub_id is not None:
            licence['license_link'] = f'https://huggingface.co/{hub_id}/blob/main/{link}'
    return licence


def _usage(job: ExportJob, text_config: Dict[str, Any], prompts: Optional[List[Any]]) -> str:
    if not is_whole_pipeline(job.backbone):
        return (f'In this folder, with cdm_plugin installed:\n\n```python\n{_package_code(prompts)}\n```\n\n'
                'The base is where `cdm_parts.json` says.')
    notes = [
        'Pass `sigmas` as above: they are the levels (before the scheduler\'s shift) that the student was trained for. '
        'A scheduler\'s config cannot carry them, and a pipeline\'s own levels for this number of steps may differ '
        '(those of StableDiffusion3Pipeline do, slightly).']
    if not isinstance(job.method, FlowMatching):
        notes.append('Guidance is built in: the call above has none on top of it, so each step is one network call.')
    if 'guidance_scale' in _call_arguments(job, text_config) and hasattr(job.backbone, 'embedded_guidance'):
        notes.append('`guidance_scale` is the guidance that the network is told; `true_cfg_scale` is the one that '
                     'stays off.')
    if text_config.get('t5') is False:
        notes.append('Diffusers wants to be told that there is no third text encoder: the student was trained without '
                     'it.')
    if job.as_lora:
        notes.append(f'The weights are {name_of(job.target_dtype)} as in training; the base is not in this folder.')
    code = _diffusers_code(job, text_config, prompts)
    return f'In this folder, with diffusers:\n\n```python\n{code}\n```\n\n' + '\n\n'.join(notes)


def _package_code(prompts: Optional[List[Any]]) -> str:
    return '\n'.join([
        'import torch', 'from cdm_plugin.images import save_pngs',
        'from cdm_plugin.inference import load_method, sample_prompts', '', "method = load_method('.')",
        'noise = torch.randn(method.latent_shape(1))',
        f"save_pngs(sample_prompts(method, [{(prompts or [0])[0]!r}], noise), '.', ['image'])"])


def _diffusers_code(job: ExportJob, text_config: Dict[str, Any], prompts: Optional[List[Any]]) -> str:
    backbone, dtype = job.backbone, job.target_dtype
    pipeline_class = backbone.pipeline_class()
    loading = {k: v for k, v in backbone.load_kwargs.items() if job.as_lora and k in ('revision', 'variant')}
    if text_config.get('t5') is False:
        loading.update(text_encoder_3=None, tokenizer_3=None)
    # They rewrite prompts, which students are not asked to; and they need more libraries.
    loading.update({name: None for name in inspect.signature(pipeline_class.__init__).parameters
                    if name.endswith('_processor')})
    arguments = [repr(absolute_folder(backbone.pretrained) if job.as_lora else '.')]
    if job.as_lora or dtype != torch.float32:
        arguments.append(f'dtype={dtype}')
    arguments += [f'{key}={value!r}' for key, value in loading.items()]
    lines = ['import torch', f'from diffusers import {pipeline_class.__name__}', '',
             _call(f'pipeline = {pipeline_class.__name__}.from_pretrained', arguments)]
    if job.as_lora:
        lines[1] = f'from diffusers import FlowMatchEulerDiscreteScheduler, {pipeline_class.__name__}'
        lines.append("pipeline.load_lora_weights('.')" if hasattr(pipeline_class, 'load_lora_weights') else
                     f"pipeline.transformer.load_lora_adapter('.', prefix={PREFIX!r}, use_safetensors=True)")
        lines.append("pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained('.', "
                     "subfolder='scheduler')")
    prompt = str((prompts or [DEFAULT_PROMPT])[0])
    call = [repr(prompt), *(f'{key}={value!r}' for key, value in _call_arguments(job, text_config).items())]
    lines += ["pipeline.to('cuda' if torch.cuda.is_available() else 'cpu')",
              _call('image = pipeline', call, '.images[0]'), "image.save('image.png')"]
    return '\n'.join(lines)


def _call(function: str, arguments: List[str], after: str = '') -> str:
    """A call as a line of code, broken if it is long."""
    line = f'{function}({", ".join(arguments)}){after}'
    if len(line) <= 100:
        return line
    return f'{function}(\n    ' + ',\n    '.join(arguments) + f'){after}'


def _call_arguments(job: ExportJob, text_config: Dict[str, Any]) -> Dict[str, Any]:
    """What a diffusers pipeline has to be told so that it samples as the student was trained to."""
    backbone, sigmas = job.backbone, job.method.sample_sigmas.tolist()
    parameters = inspect.signature(backbone.pipeline_class().__call__).parameters
    guidance = backbone.pipeline_defaults()['guidance_scale'] if isinstance(job.method, FlowMatching) else 1.0
    wanted = dict(height=job.image_size[0], width=job.image_size[1], num_inference_steps=len(sigmas), sigmas=sigmas,
                  guidance_scale=guidance)
    if 'true_cfg_scale' in parameters:
        wanted.update(guidance_scale=getattr(backbone, 'embedded_guidance', guidance), true_cfg_scale=guidance)
    if 'enable_prompt_rewrite' in parameters:
        wanted['enable_prompt_rewrite'] = False
    length = text_config.get('max_sequence_length')
    if 'max_sequence_length' in parameters and length not in (None, parameters['max_sequence_length'].default):
        wanted['max_sequence_length'] = length
    return wanted


def _describe_recipe(job: ExportJob) -> Dict[str, Any]:
    """How the student came about, as far as the method knows."""
    method = job.method
    recipe: Dict[str, Any] = {
        'method': type(method).__name__, 'weights': 'moving average (EMA)' if job.ema else "the student's own",
        'iterations': job.iterations, 'student steps': method.student_ema.steps if method.student_ema else None,
        'steps of inference': f'{len(method.sample_sigmas)}, sigmas {method.sample_sigmas.tolist()}'}
    if hasattr(method, 'alpha'):
        recipe['alpha'] = f'{method.alpha:g} (guidance scale {1 + method.alpha:g})'
        recipe['losses'] = ', '.join(f'{name} ({type(loss).__name__}, weight {getattr(loss, "weight", 1):g})'
                                     for name, loss in method.losses.items())
        recipe['time grid'] = type(method.time_grid).__name__
    if method.lora is not None:
        recipe['LoRA'] = f'rank {method.lora.rank}, alpha {method.lora.alpha:g}' + (', fused' if job.fuse else '')
    if not job.as_lora:
        recipe['dtype of the files'] = name_of(job.target_dtype)
    return {key: value for key, value in recipe.items() if value is not None}


def _versions() -> Dict[str, str]:
    libraries = ('mmengine', 'torch', 'diffusers', 'transformers', 'peft', 'safetensors')
    return {'cdm_plugin': __version__, **{name: importlib.metadata.version(name) for name in libraries}}


def _table(rows: Mapping[str, Any]) -> str:
    return '\n'.join(['| | |', '| --- | --- |', *(f'| {key} | {value} |' for key, value in rows.items())])
