"""What a config resolves to, what it needs and what would fail, before anything large is loaded.

The method is really built, but its networks lie on the meta device: they have shapes and no memory. So every setting,
every number of parameters and every optimizer state is what training will have, and activations are measured by
running forward and backward passes of shapes. What is known of a hub model that is not on this machine comes from the
recipe's `model.backbone.config` and from what its classes say is published.
"""
import copy
import importlib.metadata
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, STRATEGIES, DefaultScope
from torch import Tensor

import cdm_plugin  # noqa: F401  registers everything
from cdm_plugin.assets import resolve
from cdm_plugin.commands.doctor import distributions
from cdm_plugin.commands.doctor.calls import expected_calls
from cdm_plugin.commands.doctor.memory import (
    _accumulates,
    build_optimizers,
    count_parts,
    estimate_phases,
    measured_calls,
    without_gradients,
)
from cdm_plugin.commands.doctor.meta import build_on_meta
from cdm_plugin.commands.doctor.report import GPUS, Memory, Report, _numbers, _problems, _size
from cdm_plugin.commands.doctor.sharding import SHARINGS, Sharing, chosen, data_parallel, memory
from cdm_plugin.compat.packages import mmengine_distributions
from cdm_plugin.config import check_config, naming_parts
from cdm_plugin.data import HFDataset, HFStream, WebDataset
from cdm_plugin.engine import DistillationDeepSpeedStrategy
from cdm_plugin.engine.deepspeed_config import MISSING, OWN_KEYS, settle_config
from cdm_plugin.engine.refusals import add_missing_hook, lost_gradients, refusals
from cdm_plugin.methods import DiffusionModel, Distillation
from cdm_plugin.registry import class_of, is_type
from cdm_plugin.roles import attention
from cdm_plugin.scopes import clashes
from cdm_plugin.sigma_samplers import SigmaSampler

PACKAGES = ('torch', 'diffusers', 'transformers', 'peft', 'deepspeed', 'xformers', 'flash-attn',
            'bitsandbytes')


def diagnose(cfg: Config, gpus: int = 1, table: Sequence[int] = GPUS) -> Report:
    """Examines a training config. Nothing is downloaded, and no weights are loaded.

    Args:
        cfg (Config): The config, not necessarily valid.
        gpus (int): Number of GPUs, one process each. Default 1.
        table (Sequence[int]): Numbers of GPUs in the table of ways to share the work. Default 1, 2, 4, 8.

    Returns:
        Report: Mistakes are among its `problems`; nothing is raised for them.
    """
    report = Report(str(cfg.filename or 'config'), gpus, _versions(), _device())
    cfg = Config(copy.deepcopy(cfg.to_dict()))
    _check_surroundings(cfg, report)
    method, wrappers = None, {}
    with _problems(report), naming_parts(cfg), DefaultScope.overwrite_default_scope(
            cfg.get('default_scope', 'mmengine')):
        check_config(cfg)
        report.warnings += [*clashes(cfg.to_dict()), *add_missing_hook(cfg)]
        refused = list(refusals(cfg, gpus))
        report.problems += refused
        method = build_on_meta(cfg.model.to_dict(), report)
        if not any(text.startswith('optim_wrapper') for text in refused):
            wrappers = build_optimizers(cfg, method)
    if method is None:
        return report
    batch = cfg.train_dataloader.get('batch_size', 1)
    with _problems(report, 'the recipe'):
        report.recipe = _recipe(cfg, method, wrappers, batch, gpus)
    with _problems(report, 'network calls'):
        report.calls = expected_calls(method, batch, gpus)
    report.parts = count_parts(cfg, method, wrappers)
    report.checkpoint = sum(part.weights + part.optimizer + part.ema for part in report.parts if part.optimizer)
    if wrappers:
        with _problems(report, 'activations'):
            call = measured_calls(method, wrappers)
            report.activations, report.phases = estimate_phases(cfg, method, wrappers, batch, report.parts, call)
            others = [role for role in wrappers if role not in method.denoisers]
            if others:
                report.warnings.append(f'what the losses of {", ".join(others)} add while they run is not estimated')
            _share(cfg, method, wrappers, batch, report, call, table)
        with _problems(report):
            report.attention = _attention(method, wrappers)
    _check_space(cfg, report, method, wrappers)
    return report


def _share(cfg: Config, method: DiffusionModel, wrappers: dict[str, Any], batch: int, report: Report,
           call: Callable[..., Any], table: Sequence[int]) -> None:
    """The memory for every way to share the work, and for the config's own."""
    copies, sharded = (without_gradients(cfg, method, wrappers, batch, report.parts, call, casts)
                       for casts in (True, False))

    def shared(sharing: Sharing, gpus: int) -> Memory:
        if sharing.stage == 0:
            return data_parallel(report.parts, report.phases, copies, gpus)
        return memory(cfg, method, wrappers, report.parts, sharded, sharing, gpus)

    own = chosen(cfg)
    report.sharing_gpus = tuple(table)
    report.sharing = {sharing.name: [shared(sharing, n) for n in table] for sharing in SHARINGS}
    report.own_sharing, report.own_memory = own.name, shared(own, report.gpus)


# What the recipe says


def _recipe(cfg: Config, method: DiffusionModel, wrappers: dict[str, Any], batch: int, gpus: int) -> dict[str, str]:
    """Setting -> what it resolves to."""
    sigmas = method.sample_sigmas
    texts = [field.shape[1] for field in method.null_condition(1).fields.values() if field.ndim == 3]
    rows = {'method': type(method).__name__,
            'backbone': f'{type(method.backbone).__name__}, {cfg.model.backbone.get("pretrained") or "new weights"}',
            'image': ' or '.join(_image(method, size) for size in method.latent_sizes) + f', {sum(texts)} of text'}
    rows['sample_sigmas'] = (f'{_numbers(sigmas.tolist())}; after the shift of '
                             f'{method.backbone.shift(method.latent_sizes[0]):.4g}: '
                             f'{_numbers(method.shift(sigmas).tolist())}')
    every = getattr(method, 'student_every', 1)
    rows['rollout'] = method.rollout
    if isinstance(method, Distillation):
        rows['teacher'] = _teacher(cfg, method)
        rows['alpha'] = f'{method.alpha:g} (guidance scale {method.alpha + 1:g})'
        rows.update({f'loss {name}': _describe(loss) for name, loss in method.losses.items()})
        rows['fake score'] = (f'{_describe(method.fake_loss)}, sigma {_describe(method.fake_sigma)}, '
                              f'{"knows" if hasattr(method.fake, "anchor_embedding") else "does not know"} the anchor')
        rows['time grid'] = _describe(method.time_grid)
        rows['fake_steps'], rows['student_every'] = str(method.fake_steps), str(every)
        rows['fake_merge'], rows['sigma_shift'] = f'{method.fake_merge:g}', method.sigma_shift
    else:
        rows['sigma'], rows['drop_rate'] = _describe(method.sigma), f'{method.drop_rate:g}'
    rows['LoRA'] = 'off'
    if method.lora is not None:
        layers = list(method.lora.target_modules or method.backbone.lora_targets)
        rows['LoRA'] = (f'one base, adapters of rank {method.lora.rank}, alpha {method.lora.alpha:g} on '
                        + ', '.join(layers[:8]) + (f' and {len(layers) - 8} more' if len(layers) > 8 else ''))
    rows['checkpointing'] = 'activations are recomputed in backward' if method.activation_checkpointing else 'off'
    for role, wrapper in wrappers.items():
        rows[f'optimizer {role}'] = _describe_optimizer(cfg.optim_wrapper[role], wrapper)
    counts = max((getattr(w, '_accumulative_counts', 1) for w in wrappers.values()), default=1)
    iterations = cfg.get('train_cfg', {}).get('max_iters')
    rows['batch'] = f'{batch} x {gpus} GPU{"s" * (gpus > 1)}' + (
        f' x {counts} accumulated' if counts > 1 else '') + f' = {batch * gpus * counts}'
    if iterations:
        rows['iterations'] = f'{iterations:,}, {iterations // every:,} student steps' + (
            f', {iterations // every // counts:,} updates of the student' if counts > 1 else '')
    return rows


def _image(method: DiffusionModel, latent_size: tuple[int, int]) -> str:
    height, width = (side * method.backbone.codec.scale for side in latent_size)
    return f'{height}x{width} pixels, {method.backbone.tokens(latent_size)} tokens'


def _teacher(cfg: Config, method: Distillation) -> str:
    settings = cfg.model.get('teacher') or {}
    given = ', '.join(f'{key} {value}' for key, value in settings.items() if key != 'config')
    same = method.backbone_of('teacher') is method.backbone
    return given or ("the backbone's network" if same else 'another network')


def _describe(thing: Any) -> str:
    """Class and plain settings of a loss, sampler or grid."""
    settings = []
    for key, value in vars(thing).items():
        if isinstance(value, SigmaSampler):
            settings.append(f'{key} {_describe(value)}')
        elif isinstance(value, Tensor) and not key.startswith('_'):
            settings.append(f'{key} {_numbers(value.tolist())}')
        elif isinstance(value, (int, float, str)) and not key.startswith('_') and key != 'training':
            settings.append(f'{key} {value:g}' if type(value) in (int, float) else f'{key} {value}')
    text = ', '.join(settings)
    return f'{type(thing).__name__}({text})' if settings else type(thing).__name__


def _describe_optimizer(cfg: dict[str, Any], wrapper: Any) -> str:
    group = wrapper.optimizer.param_groups[0]
    options = {k: v for k, v in cfg.get('optimizer', {}).items() if k not in ('type', 'lr')}
    dtype = getattr(wrapper, 'dtype', None)
    rows = [type(wrapper.optimizer).__name__, f'lr {group["lr"]:g}', *(f'{k} {v}' for k, v in options.items()),
            'no autocast' if dtype is None else f'autocast {str(dtype).removeprefix("torch.")}']
    if wrapper.clip_grad_kwargs:
        rows.append('clip ' + ', '.join(f'{k} {v}' for k, v in wrapper.clip_grad_kwargs.items()))
    if _accumulates(wrapper):
        rows.append(f'{wrapper._accumulative_counts} steps accumulated')
    return ', '.join(rows)


# This machine, and what would fail


def _versions() -> dict[str, str]:
    found = dict(python=platform.python_version())
    found.update({distribution.metadata['Name']: distribution.version for distribution in mmengine_distributions()})
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = 'not installed'
    return found


def _device() -> str:
    if not torch.cuda.is_available():
        return 'CPU, no CUDA device'
    properties = torch.cuda.get_device_properties(0)
    return (f'{torch.cuda.device_count()} x {properties.name}, {_size(properties.total_memory)} each, '
            f'CUDA {torch.version.cuda}')


def _attention(method: DiffusionModel, wrappers: dict[str, Any]) -> str:
    """The kernel of the networks on this machine; the networks themselves stay on the meta device."""
    network = method.base if method.base is not None else method.student
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    dtype = getattr(wrappers.get('student'), 'dtype', None) or network.dtype
    name = method.backbone.attention
    kernel, why = attention.set_attention(network, name, device, dtype, masked=method.backbone.takes_mask)
    return f'{name!r} is {kernel} here: {why}'


def _check_surroundings(cfg: Config, report: Report) -> None:
    """Files, packages and processes."""
    report.problems += filter(None, [distributions.problem()])
    report.warnings += filter(None, [distributions.warning()])
    if 'strategy' in cfg and report.versions['deepspeed'] == 'not installed':
        report.problems.append(MISSING)
    elif is_type(cfg.get('strategy'), DistillationDeepSpeedStrategy, STRATEGIES):
        with _problems(report):
            settings = {k: v for k, v in cfg.strategy.to_dict().items() if k not in OWN_KEYS | {'type'}}
            settle_config(settings.pop('config', None), settings)
    dataset = cfg.get('train_dataloader', {}).get('dataset')
    for part in _dicts(dataset):
        root = part.get('data_root') or ''
        for key in ('ann_file', 'data_file', 'data_root'):
            path = part.get(key)
            if not isinstance(path, str) or not path or '://' in path:
                continue
            with _problems(report):
                where = Path(resolve(path if key == 'data_root' else os.path.join(resolve(root), path)
                                     if not path.startswith('asset:') else path))
                if not where.exists():
                    report.problems.append(f'train_dataloader.dataset: {key}={path!r} does not exist')
        package = {HFDataset: 'datasets', HFStream: 'datasets', WebDataset: 'webdataset'}.get(class_of(part, DATASETS))
        if package and find_spec(package) is None:
            report.problems.append(f"train_dataloader.dataset: {part['type']} needs the package {package}: pip install "
                                   "'cdm_plugin[data]'")
        elif is_type(part, WebDataset, DATASETS):
            with _problems(report):  # its files, of which it reads none
                DATASETS.build({**part, 'pipeline': []})
    backbone = cfg.get('model', {}).get('backbone') or {}
    if backbone.get('quantization') and report.versions['bitsandbytes'] == 'not installed':
        report.problems.append('model.backbone.quantization needs the package bitsandbytes, which is not installed')
    small = str(backbone.get('pretrained') or 'asset:').startswith('asset:')
    if not torch.cuda.is_available() and not small:
        report.warnings.append('there is no CUDA device here')


def _dicts(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        for child in value.values():
            yield from _dicts(child)
    elif isinstance(value, (list, tuple)):
        for child in value:
            yield from _dicts(child)


def _check_space(cfg: Config, report: Report, method: DiffusionModel, wrappers: dict[str, Any]) -> None:
    """GPU memory, disk, and checkpoints that lose gradients."""
    if torch.cuda.is_available() and report.phases:
        total = torch.cuda.get_device_properties(0).total_memory
        if report.needed > total:
            report.problems.append(f'about {_size(report.needed)} are needed at a time, but this GPU has '
                                   f'{_size(total)}')
        elif report.needed > 0.9 * total:
            report.warnings.append(f'about {_size(report.needed)} of this GPU\'s {_size(total)} are needed, and CUDA '
                                   'and the allocator take some too')
    checkpoint = cfg.get('default_hooks', {}).get('checkpoint') or {}
    folder = Path(cfg.get('work_dir') or 'work_dirs').absolute()
    free = shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free
    # MMEngine deletes the oldest after it has written the newest.
    needed = report.checkpoint * (max(checkpoint.get('max_keep_ckpts', 1), 1) + 1)
    if checkpoint and needed > free:
        report.warnings.append(f'{_size(needed)} of checkpoints (default_hooks.checkpoint.max_keep_ckpts='
                               f'{checkpoint.get("max_keep_ckpts", -1)}) do not fit the {_size(free)} that are free')
    if not checkpoint.get('by_epoch', True):
        report.warnings += lost_gradients(method, wrappers, checkpoint.get('interval', -1))
