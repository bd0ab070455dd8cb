"""The model card of an export."""
import html
import importlib.metadata
import inspect
import re
import shutil
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache
from yaml import YAMLError

from cdm_plugin.backbones import Backbone
from cdm_plugin.compat.packages import mmengine_distributions
from cdm_plugin.export.job import CARD_FILE, FLOAT8, ExportJob, is_whole_pipeline, name_of
from cdm_plugin.export.recipe import describe_recipe, how_to_sample, is_distilled
from cdm_plugin.export.sd_scripts import SD_SCRIPTS_FILE
from cdm_plugin.files import inside
from cdm_plugin.pretrained import absolute_folder
from cdm_plugin.roles.lora import PREFIX
from cdm_plugin.version import __version__

DEFAULT_PROMPT = 'a red fox in the snow'
# In the card's code, before the name of a base that is a folder: where it lies is nobody else's concern.
PLACEHOLDER = 'path/to/'
TURNS = set('\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069')


def model_card(job: ExportJob, staging: Path, text_config: dict[str, Any], prompts: list[Any] | None,
                samples: list[str]) -> ModelCard:
    backbone = job.backbone
    metadata, base_folder = _read_base_card(backbone)
    licence = {key: metadata[key] for key in ('license', 'license_name', 'license_link') if metadata.get(key)}
    hub_id, recipe, distilled = _hub_id(backbone), describe_recipe(job), is_distilled(job)
    sigmas, guidance = how_to_sample(job)
    steps = len(sigmas)
    shown = _as_text(hub_id or (Path(absolute_folder(backbone.pretrained)).name if backbone.pretrained else
                                backbone.network_class.__name__))
    data = ModelCardData(
        base_model=hub_id, library_name='diffusers',
        pipeline_tag='text-to-image' if is_whole_pipeline(backbone) else None,
        tags=[*(['cdm', 'distillation', 'few-step'] if distilled else []), recipe['method'].lower(),
              *(['lora'] if job.as_lora else [])],
        **_licence_fields(licence, hub_id, base_folder, staging))
    what = 'A LoRA adapter' if job.as_lora else 'A model'
    kind = 'of' if backbone.pretrained else 'from random weights, a'
    how = f'distilled to make images in {steps} steps' if distilled else (
        f'fine-tuned, not distilled: it makes images in about {steps} steps with a guidance scale of {guidance:g}, as '
        'its base does')
    sections = [
        f'# {shown}, {f"{steps} steps" if distilled else "fine-tuned"}',
        f'{what} {kind} {shown}, {how}, {job.image_size[1]}x{job.image_size[0]} pixels. Written by cdm_plugin.',
        '## How to use', _usage(job, staging, text_config, prompts)]
    if samples:
        shown_prompts = [_as_text(re.sub(r'[\[\]]', ' ', str(prompt))) for prompt in prompts]
        images = [f'{prompt}\n\n![{prompt}]({name})' for prompt, name in zip(shown_prompts, samples)]
        sections += ['## Samples', f'{steps} steps, first images drawn:', *images]
    found = _as_text(licence['license']) if 'license' in licence else 'see its page or folder'
    sections += ['## Recipe', _table(recipe)]
    if backbone.pretrained is not None:
        sections += ['## Licence', f'The licence of the base model, {shown}, applies: {found}.']
    sections += ['## Versions', _table(_versions())]
    if job.config is not None:
        sections += ['## Config', f'<details><summary>The whole training config</summary>\n\n````python\n'
                                  f'{job.config.pretty_text.strip()}\n````\n\n</details>']
    text = '\n\n'.join(sections)
    return ModelCard(f'---\n{data.to_yaml()}\n---\n\n{text}\n')


def _hub_id(backbone: Backbone) -> str | None:
    """The base's name on the hub, if it has one."""
    if backbone.pretrained is None or not Path(backbone.pretrained).is_dir():
        return backbone.pretrained
    cached = [part for part in Path(absolute_folder(backbone.pretrained)).parts if part.startswith('models--')]
    return cached[-1].removeprefix('models--').replace('--', '/') if cached else None


def _read_base_card(backbone: Backbone) -> tuple[dict[str, Any], Path | None]:
    """Metadata of the base's own model card, and its folder; of a hub model only if it is on this machine."""
    if backbone.pretrained is None:
        return {}, None
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


def _licence_fields(licence: dict[str, Any], hub_id: str | None, base_folder: Path | None,
                    staging: Path) -> dict[str, Any]:
    """The card's licence; a file that it names by a relative path is copied, or linked where the base has it."""
    licence = dict(licence or dict(license='other'))
    link = str(licence.get('license_link', ''))
    if link and '://' not in link:
        file = None if base_folder is None else base_folder / link
        if file is not None and file.is_file() and Path(link).name == link and not (staging / link).exists():
            shutil.copyfile(inside(base_folder, link, base_folder / CARD_FILE), staging / link)
        elif hub_id is not None:
            licence['license_link'] = f'https://huggingface.co/{hub_id}/blob/main/{link}'
    return licence


def _usage(job: ExportJob, staging: Path, text_config: dict[str, Any], prompts: list[Any] | None) -> str:
    if not is_whole_pipeline(job.backbone):
        base = '\n\nThe base is where `cdm_parts.json` says.' if job.as_lora else ''
        return f'In this folder, with cdm_plugin installed:\n\n```python\n{_package_code(prompts)}\n```{base}'
    notes = []
    if is_distilled(job):
        notes += [
            'Pass `sigmas` as above: they are the levels (before the scheduler\'s shift) that the student was trained '
            'for. A scheduler\'s config cannot carry them, and a pipeline\'s own levels for this number of steps may '
            'differ (of StableDiffusion3Pipeline\'s the last lies near 0).',
            'Guidance is built in: the call above has none on top of it, so each step is one network call.']
        if job.method.rollout == 'renoise':
            notes.append('Each step noises the estimate of the image anew (`stochastic_sampling` in the scheduler), as '
                         'the student was trained to: `torch.manual_seed` before the call makes it repeatable.')
    call = _call_arguments(job, text_config)
    if 'guidance_scale' in call and hasattr(job.backbone, 'embedded_guidance'):
        notes.append('`guidance_scale` is the guidance that the network is told'
                     + ('; `true_cfg_scale` is the one that stays off.' if 'true_cfg_scale' in call else '.'))
    if text_config.get('t5') is False:
        notes.append('Diffusers wants to be told that there is no third text encoder: the student was trained without '
                     'it.')
    if job.as_lora:
        notes.append(f'The weights are {name_of(job.target_dtype)} as in training; the base is not in this folder.')
        base = _base_in_code(job.backbone)[0]
        if base.startswith(PLACEHOLDER):
            notes.append(f'`{base}` stands for the folder of the base model: put yours in its place.')
    if job.dtype == FLOAT8:
        notes.append('The linear layers are in float8. Without the line with `enable_layerwise_casting` they make the '
                     'same images and take twice the memory.')
    code = _diffusers_code(job, text_config, prompts)
    others = _other_tools(job, staging) if is_distilled(job) else []
    return '\n\n'.join([f'In this folder, with diffusers:\n\n```python\n{code}\n```', *notes, *others])


def _other_tools(job: ExportJob, staging: Path) -> list[str]:
    """What other tools have to be told so that they sample as the student was trained to."""
    backbone, (sigmas, _) = job.backbone, how_to_sample(job)
    levels = [f'{level:.4g}' for level in backbone.shift_grid(sigmas, job.method.latent_sizes[0]).tolist()]
    guidance = backbone.embedded_guidance if backbone.config.get('guidance_embeds') else None
    told = '' if guidance is None else f', and {guidance:g} as the guidance that the network is told'
    anew = job.method.rollout == 'renoise'
    lines = [
        '### In other tools',
        f'{len(sigmas)} steps {"of LCM, which noises the image anew," if anew else "of Euler"} at the noise levels '
        f'{", ".join(levels)}. The shift for {job.image_size[1]}x'
        f'{job.image_size[0]} pixels is in them. No guidance on top (cfg 1){told}.']
    file = LORA_WEIGHT_NAME_SAFE if job.as_lora else f'transformer/{SAFETENSORS_WEIGHTS_NAME}'
    if job.as_lora or (backbone.whole_in_comfyui and (staging / file).is_file()):
        what = 'Load LoRA, strength 1, on the base' if job.as_lora else (
            "Load Diffusion Model, beside the base's text encoders and VAE")
        node = '' if guidance is None else f', `FluxGuidance` {guidance:g}'
        sampler = 'lcm' if anew else 'euler'
        lines.append(f'ComfyUI: `{file}` as it is ({what}). Sampler `{sampler}`, `cfg` 1{node}, and the levels by the '
                     f'node `ManualSigmas`: `{", ".join([*levels, "0"])}`.')
    if job.sd_scripts:
        lines.append(f'sd-scripts: `{SD_SCRIPTS_FILE}`, multiplier 1'
                     f'{"; its own sampling takes Euler steps, for which the student is not made" if anew else ""}.')
    return lines


def _base_in_code(backbone: Backbone) -> tuple[str, dict[str, Any]]:
    """What from_pretrained takes for the base on any machine: its hub id and revision, or a folder to fill in."""
    which = {k: v for k, v in backbone.load_kwargs.items() if k in ('revision', 'variant')}
    if not Path(backbone.pretrained).is_dir():
        return backbone.pretrained, which
    folder, hub_id = Path(absolute_folder(backbone.pretrained)), _hub_id(backbone)
    if hub_id is not None and folder.parent.name == 'snapshots':
        return hub_id, dict(which, revision=folder.name)
    return PLACEHOLDER + folder.name, which


def _package_code(prompts: list[Any] | None) -> str:
    return '\n'.join([
        'import torch', 'from cdm_plugin.sheets import save_pngs',
        'from cdm_plugin.inference import load_method, sample_prompts', '', "method = load_method('.')",
        'noise = torch.randn(method.latent_shape(1))',
        f"save_pngs(sample_prompts(method, [{(prompts or [0])[0]!r}], noise), '.', ['image'])"])


def _diffusers_code(job: ExportJob, text_config: dict[str, Any], prompts: list[Any] | None) -> str:
    backbone, dtype = job.backbone, job.target_dtype
    pipeline_class = backbone.pipeline_class()
    base, loading = _base_in_code(backbone) if job.as_lora else ('.', {})
    if text_config.get('t5') is False:
        loading.update(text_encoder_3=None, tokenizer_3=None)
    # They rewrite prompts, which students are not asked to; and they need more libraries.
    loading.update({name: None for name in inspect.signature(pipeline_class.__init__).parameters
                    if name.endswith('_processor')})
    arguments = [repr(base)]
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
    if job.dtype == FLOAT8:
        lines.append(f'pipeline.transformer.enable_layerwise_casting(storage_dtype={FLOAT8}, compute_dtype={dtype})')
    prompt = str((prompts or [DEFAULT_PROMPT])[0])
    call = [f'{key}={value!r}' for key, value in dict(prompt=prompt, **_call_arguments(job, text_config)).items()]
    lines += ["pipeline.to('cuda' if torch.cuda.is_available() else 'cpu')",
              _call('image = pipeline', call, '.images[0]'), "image.save('image.png')"]
    return '\n'.join(lines)


def _call(function: str, arguments: list[str], after: str = '') -> str:
    """A call as a line of code, broken if it is long."""
    line = f'{function}({", ".join(arguments)}){after}'
    if len(line) <= 100:
        return line
    return f'{function}(\n    ' + ',\n    '.join(arguments) + f'){after}'


def _call_arguments(job: ExportJob, text_config: dict[str, Any]) -> dict[str, Any]:
    """What a diffusers pipeline has to be told so that it samples as the student was trained to."""
    backbone, (sigmas, guidance) = job.backbone, how_to_sample(job)
    parameters = inspect.signature(backbone.pipeline_class().__call__).parameters
    wanted: dict[str, Any] = dict(height=job.image_size[0], width=job.image_size[1], num_inference_steps=len(sigmas))
    if is_distilled(job):
        wanted['sigmas'] = sigmas.tolist()
    wanted.update(backbone.pipeline_guidance(guidance))
    if 'enable_prompt_rewrite' in parameters:
        wanted['enable_prompt_rewrite'] = False
    length = text_config.get('max_sequence_length')
    if 'max_sequence_length' in parameters and length not in (None, parameters['max_sequence_length'].default):
        wanted['max_sequence_length'] = length
    return wanted


def _versions() -> dict[str, str]:
    libraries = ('torch', 'diffusers', 'transformers', 'peft', 'safetensors')
    return {'cdm_plugin': __version__, **{d.metadata['Name']: d.version for d in mmengine_distributions()},
            **{name: importlib.metadata.version(name) for name in libraries}}


def _table(rows: Mapping[str, Any]) -> str:
    return '\n'.join(['| | |', '| --- | --- |',
                      *(f'| {_as_text(key)} | {_as_text(value)} |' for key, value in rows.items())])


def _as_text(value: Any) -> str:
    """One line of Markdown that shows a text and does nothing else: prompts, and what an earlier folder says, may be a
    stranger's. Control characters and those that turn the direction of the line around are left out."""
    text = ' '.join(''.join(c for c in str(value) if c.isspace() or unicodedata.category(c) != 'Cc' and c not in TURNS
                            ).split())
    text = html.escape(text, quote=False)
    text = re.sub(r'[\\`*~|$]|\](?=[(\[:])|(?<![^\W_])_|_(?![^\W_])|^[-+=#]', r'\\\g<0>', text)
    text = re.sub(r'^(\d+)([.)]) ', r'\1\\\2 ', text)
    return re.sub(r'(?<=\w):(?=//)|(?<=www)\.', lambda m: f'&#{ord(m[0])};', text)  # what Markdown makes links of

