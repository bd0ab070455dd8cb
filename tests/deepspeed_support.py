"""Short runs of the DeepSpeed strategy, and the same in one process without it."""
import copy
import os

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import MODELS
from mmengine.runner import CheckpointLoader, FlexibleRunner, Runner
from scale_support import share_draws
from tests_support import perturb, tiny_backbone

from cdm_plugin.hooks.method import method_of

GLOBAL_BATCH = 4
CYCLES = 10


def config(work_dir, world_size=1, iters=2 * CYCLES, strategy=None, accumulate=1, dataset=None, **model):
    """A short run of the tiny SD3 or another model, in one process or, with a strategy, in several."""
    # With AdamW's small epsilon a rounding error of a gradient near 0 would become a whole step.
    wrapper = dict(optimizer=dict(type='AdamW', lr=1e-2, eps=1e-4), clip_grad=dict(max_norm=0.5),
                   accumulative_counts=accumulate)
    cfg = dict(
        model={**dict(type='CDM', backbone=tiny_backbone(), anchor_aware_fake=True, fake_merge=0.05,
                     time_grid=dict(max_steps=6)), **model},
        optim_wrapper=dict(constructor='DistillationOptimWrapperConstructor', student=copy.deepcopy(wrapper),
                           fake=copy.deepcopy(wrapper)),
        param_scheduler=dict(student=[dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=10)],
                             fake=[dict(type='ConstantLR', factor=0.5, by_epoch=False, begin=0, end=4)]),
        train_dataloader=dict(
            batch_size=GLOBAL_BATCH // world_size, num_workers=0, sampler=dict(type='InfiniteSampler', shuffle=False),
            dataset=dataset or dict(type='LabelDataset', num_classes=3, length=24)),
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=iters),
        default_hooks=dict(
            logger=dict(type='LoggerHook', interval=1, log_metric_by_epoch=False),
            checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=8, max_keep_ckpts=-1)),
        custom_hooks=[dict(type='CDMHook', ema_decay=0.9)],
        log_processor=dict(by_epoch=False, window_size=1), log_level='WARNING', randomness=dict(seed=0),
        work_dir=str(work_dir), default_scope='mmengine', experiment_name=f'run{os.urandom(4).hex()}')
    if strategy is not None:
        cfg.update(strategy=dict(type='DistillationDeepSpeedStrategy', **strategy),
                   launcher='pytorch' if world_size > 1 else 'none')
    return Config(cfg)


def build(cfg, world_size=1, rank=0, share=True):
    """The runner, whose model has perturbed networks and draws its share of the global batch."""
    torch.manual_seed(0)
    method = MODELS.build(cfg.model)
    for role in ('teacher', 'student', 'fake'):
        perturb(getattr(method, role))
    if share:
        share_draws(method, rank, world_size, interleaved=True)
    cls = FlexibleRunner if 'strategy' in cfg else Runner
    return cls(**{**cfg, 'model': method}, cfg=cfg)


def build_pretrained(cfg, world_size=1, rank=0):
    """The runner of a model that the strategy builds itself, from pretrained weights."""
    runner = (FlexibleRunner if 'strategy' in cfg else Runner).from_cfg(cfg)
    runner.register_hook(ShareDraws(rank, world_size))
    return runner


class ShareDraws(Hook):
    """Makes the runner's method draw its share of the global batch."""

    def __init__(self, rank, world_size):
        self.rank, self.world_size = rank, world_size

    def before_train(self, runner):
        share_draws(method_of(runner), self.rank, self.world_size, interleaved=True)


def checkpoint(path):
    """A checkpoint with whole weights, wherever it comes from."""
    return CheckpointLoader.load_checkpoint(str(path), 'cpu')


def logged(runner):
    """Losses of every iteration."""
    return {key: list(buffer.data[0]) for key, buffer in runner.message_hub.log_scalars.items() if '/loss' in key}


# The work_dir's name and the strategy of every run that is compared with the one in a single process. The threshold
# partitions some weights, and leaves small ones whole, as real networks have it.
STRATEGIES = dict(
    stage1=dict(zero_optimization=dict(stage=1)),
    stage2=dict(zero_optimization=dict(stage=2)),
    stage3=dict(zero_optimization=dict(stage=3, stage3_param_persistence_threshold=100)),
    offload2=dict(zero_optimization=dict(stage=2, offload_optimizer=dict(device='cpu'))),
    offload3=dict(zero_optimization=dict(stage=3, offload_optimizer=dict(device='cpu'),
                                         offload_param=dict(device='cpu'))))


def train(work_dir, strategy, resume=False, build=build, load_from=None, **options):
    """One process of a run; its losses."""
    world_size = int(os.environ.get('WORLD_SIZE', 1))
    cfg = config(work_dir, world_size, strategy=strategy, **options)
    cfg.resume, cfg.load_from = resume, load_from
    runner = build(cfg, world_size, int(os.environ.get('RANK', 0)))
    runner.train()
    return logged(runner)
