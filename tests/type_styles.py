"""The ways in which a config may write its types."""
from typing import Any

from mmengine import registry as root
from mmengine.config import Config
from mmengine.registry import Registry

STYLES = ('scope', 'path', 'class')

LAZY = '''
from mmengine.config import read_base
from mmengine.dataset import InfiniteSampler, default_collate
from mmengine.optim import OptimWrapper
from mmengine.runner import IterBasedTrainLoop
from torch.optim import AdamW

from cdm_plugin.backbones import SD3Backbone
from cdm_plugin.data import LabelDataset
from cdm_plugin.engine import DistillationOptimWrapperConstructor
from cdm_plugin.hooks import CDMHook
from cdm_plugin.losses import CALoss
from cdm_plugin.methods import CDM
from cdm_plugin.sigma_samplers import UniformSigma

with read_base():
    from .runtime import *

model = dict(
    type=CDM, backbone=dict(type=SD3Backbone, pretrained='asset:digits/teacher'), alpha=1.0, student_every=2,
    losses=dict(ca=dict(type=CALoss, sigma=dict(type=UniformSigma))))
train_dataloader = dict(
    batch_size=4, num_workers=0, sampler=dict(type=InfiniteSampler, shuffle=True),
    collate_fn=dict(type=default_collate), dataset=dict(type=LabelDataset, num_classes=10))
optim_wrapper = dict(
    constructor=DistillationOptimWrapperConstructor,
    student=dict(type=OptimWrapper, optimizer=dict(type=AdamW, lr=2e-4)),
    fake=dict(type=OptimWrapper, optimizer=dict(type=AdamW, lr=2e-4)))
train_cfg = dict(type=IterBasedTrainLoop, max_iters=2)
custom_hooks = [dict(type=CDMHook)]
'''
RUNTIME = '''
from mmengine.hooks import CheckpointHook
default_hooks = dict(checkpoint=dict(type=CheckpointHook, by_epoch=False, interval=2))
log_level = 'ERROR'
randomness = dict(seed=0)
'''


def write_lazy(folder) -> str:
    """A config in plain Python, whose types are classes and whose base is imported."""
    (folder / 'runtime.py').write_text(RUNTIME)
    (folder / 'lazy.py').write_text(LAZY)
    return str(folder / 'lazy.py')


def named(path: str) -> Config:
    """A config whose types are classes or import paths, with registered names instead."""
    def rename(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(map(rename, value))
        if not isinstance(value, dict):
            return value
        return {key: child.split('.')[-1] if key in ('type', 'constructor') else rename(child)
                for key, child in value.items()}

    return Config(rename(Config.fromfile(path).to_dict()))


def restyled(cfg: Config, style: str) -> Config:
    """A config whose registered names are written with a scope, as import paths or as the classes themselves."""
    return Config(_restyle(cfg.to_dict(), style), filename=cfg.filename)


def _restyle(value: Any, style: str) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_restyle(child, style) for child in value)
    if not isinstance(value, dict):
        return value
    new = {key: _restyle(child, style) for key, child in value.items()}
    for registry in vars(root).values():
        cls = registry.module_dict.get(value.get('type')) if isinstance(registry, Registry) else None
        if cls is not None:
            path = f'{cls.__module__}.{cls.__qualname__}'
            new['type'] = {'scope': f'mmengine.{value["type"]}', 'path': path, 'class': cls}[style]
    return new
