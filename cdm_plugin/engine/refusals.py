"""What of MMEngine does not go with the methods, and the key to use in its place."""
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

from mmengine._strategy import SingleDeviceStrategy
from mmengine.dataset import DefaultSampler, InfiniteSampler
from mmengine.hooks import EMAHook
from mmengine.registry import (
    DATA_SAMPLERS,
    DATASETS,
    HOOKS,
    LOOPS,
    MODEL_WRAPPERS,
    MODELS,
    OPTIM_WRAPPER_CONSTRUCTORS,
    STRATEGIES,
)
from mmengine.runner import EpochBasedTrainLoop

from cdm_plugin.data.mix import MixSampler, WeightedMixDataset
from cdm_plugin.data.stream import Stream
from cdm_plugin.engine.data_parallel import DistillationDataParallel
from cdm_plugin.engine.deepspeed_strategy import DistillationDeepSpeedStrategy
from cdm_plugin.engine.optim_wrapper import DistillationOptimWrapperConstructor
from cdm_plugin.methods import DiffusionModel
from cdm_plugin.registry import class_of, is_type

# Keys of a single optimizer's wrapper. MMEngine's `--amp` sets the first two beside a constructor, too.
OF_ONE_WRAPPER = ('type', 'loss_scale', 'dtype', 'optimizer', 'clip_grad', 'accumulative_counts')
COPIES = "model_wrapper_cfg=dict(type='DistillationDataParallel')"
SHARDS = "strategy=dict(type='DistillationDeepSpeedStrategy', zero_optimization=dict(stage=3))"


# Both exchange weights around a validation, and change back in the same order.
TWO_AVERAGES = ("custom_hooks has MMEngine's EMAHook beside the student's average of CDMHook, and each validation "
                'would leave the student with the weights of one of them: remove EMAHook, or set ema_decay=None of '
                'CDMHook')


def refusals(cfg: Mapping[str, Any], processes: int = 1) -> Iterator[str]:
    """One line for each of a config's settings with which training would fail, hang or differ from what was meant.

    The one list of them: `cdm train` and CDMHook end a run with the first, `cdm doctor` names all.

    Args:
        cfg (Mapping): A config of MMEngine's runner; nothing is built from it. What it does not say is not judged.
        processes (int): Of the run. Default 1.
    """
    if not is_type(cfg.get('model'), DiffusionModel, MODELS):
        return
    if cfg.get('compile'):
        yield (f'compile={cfg["compile"]!r} would compile a whole iteration of all networks, which does not end: set '
               'model.backbone.compile=True, which compiles the blocks that repeat, and leave compile out')
    yield from _of_optimizers(cfg.get('optim_wrapper'), class_of(cfg['model'], MODELS))
    wrapper = class_of(cfg.get('model_wrapper_cfg'), MODEL_WRAPPERS)
    if wrapper is not None and not is_type(wrapper, DistillationDataParallel):
        yield (f"model_wrapper_cfg.type must be 'DistillationDataParallel', which knows the roles, but is "
               f'{wrapper.__name__!r}')
    elif processes > 1 and wrapper is None and cfg.get('strategy') is None:
        yield f'a run of several processes needs {COPIES}, or {SHARDS}'
    yield from _of_hooks(cfg.get('custom_hooks') or ())
    strategy = class_of(cfg.get('strategy'), STRATEGIES)
    if strategy is not None and strategy is not SingleDeviceStrategy and not is_type(
            strategy, DistillationDeepSpeedStrategy):
        yield (f'strategy.type={strategy.__name__!r} wraps one network with one optimizer: take {SHARDS}, or {COPIES} '
               'without a strategy')
    loader, loop = cfg.get('train_dataloader') or {}, cfg.get('train_cfg') or {}
    yield from _of_streams(cfg)
    by_epoch = is_type(loop, EpochBasedTrainLoop, LOOPS) or loop.get('by_epoch') is True
    sampler = class_of(loader.get('sampler'), DATA_SAMPLERS)
    if by_epoch and is_type(sampler, InfiniteSampler):
        instead = '' if issubclass(sampler, MixSampler) else ', or DefaultSampler'  # which a mix cannot take
        yield (f'train_dataloader.sampler.type={sampler.__name__!r} has no end, and train_cfg counts epochs: take '
               f"train_cfg=dict(type='IterBasedTrainLoop', max_iters=...){instead}")
    yield from _of_mixes(loader)


def _of_mixes(loader: Mapping[str, Any]) -> Iterator[str]:
    dataset, sampler = loader.get('dataset'), loader.get('sampler')
    shuffles = (is_type(sampler, (DefaultSampler, InfiniteSampler), DATA_SAMPLERS) and not is_type(
        sampler, MixSampler, DATA_SAMPLERS) and (not isinstance(sampler, Mapping) or sampler.get('shuffle', True)))
    if is_type(dataset, WeightedMixDataset, DATASETS):
        if shuffles:
            yield ('train_dataloader.sampler shuffles the draws of a WeightedMixDataset, whose sources are shuffled '
                   "and keeps the proportions by its order: set train_dataloader.sampler=dict(type='MixSampler')")
    elif _has(dataset, WeightedMixDataset):
        yield ('train_dataloader.dataset has a WeightedMixDataset inside of another dataset: wrap its sources instead, '
               'or put their samples into one mix')


def _has(value: Any, kind: type) -> bool:
    if isinstance(value, Mapping):
        return is_type(value, kind, DATASETS) or any(_has(child, kind) for child in value.values())
    return isinstance(value, (list, tuple)) and any(_has(child, kind) for child in value)


def add_missing_hook(cfg: MutableMapping[str, Any]) -> list[str]:
    """Adds CDMHook to a config that forgot it, and says so in a line; for commands: a program may register hooks of its
    own, and has the method's error without it."""
    from cdm_plugin.hooks import CDMHook, IterationHook
    hooks = cfg.get('custom_hooks') or ()
    if not is_type(cfg.get('model'), DiffusionModel, MODELS) or any(
            _is_hook(hook, (CDMHook, IterationHook)) for hook in hooks):
        return []
    cfg['custom_hooks'] = [*hooks, dict(type='CDMHook')]
    return ["custom_hooks has no CDMHook: commands add it, a runner of your own needs dict(type='CDMHook') there"]


def lost_gradients(method: DiffusionModel, wrappers: Mapping[str, Any], interval: int) -> Iterator[str]:
    """A line if a checkpoint every `interval` iterations loses gradients that wait for their update, which none has.

    Args:
        method (DiffusionModel): With its phases.
        wrappers (Mapping): Optimizer wrappers by role.
        interval (int): Iterations from checkpoint to checkpoint.
    """
    counts = {role: getattr(wrapper, '_accumulative_counts', 1) for role, wrapper in wrappers.items()}
    cycle = max((counts[phase.role] * phase.every for phase in method.phases if counts.get(phase.role, 1) > 1),
                default=1)
    if interval > 0 and interval % cycle:
        yield (f'default_hooks.checkpoint.interval={interval} is no multiple of {cycle} (iterations a turn x '
               'accumulative_counts): a run resumed from such a checkpoint loses the gradients accumulated until then '
               'and differs from an uninterrupted one')


def _of_hooks(hooks: Any) -> Iterator[str]:
    from cdm_plugin.hooks import CDMHook, StudentEMAHook  # hooks refuse by this list
    averaged = any(_is_hook(hook, StudentEMAHook) or _is_hook(hook, CDMHook) and isinstance(hook, Mapping)
                   and hook.get('ema_decay', True) is not None for hook in hooks)
    if averaged and any(_is_hook(hook, EMAHook) for hook in hooks):
        yield TWO_AVERAGES


def _is_hook(hook: Any, kinds: type | tuple[type, ...]) -> bool:
    return isinstance(hook, kinds) or is_type(hook, kinds, HOOKS)


def _of_streams(cfg: Mapping[str, Any]) -> Iterator[str]:
    for split in ('train', 'val', 'test'):
        key = f'{split}_dataloader'
        loader = cfg.get(key) or {}
        if not isinstance(loader, Mapping) or not is_type(loader.get('dataset'), Stream, DATASETS):
            if isinstance(loader, Mapping) and _has(loader.get('dataset'), Stream):
                yield (f'{key}.dataset has a stream inside of another dataset, and a stream is read in its own order: '
                       f'make it {key}.dataset itself (its max_bad leaves bad records out), or take a dataset with a '
                       'length, such as HFDataset')
            continue
        stream = class_of(loader['dataset'], DATASETS).__name__
        if split != 'train':
            yield f'{key}.dataset.type={stream!r} has no end: take a dataset with a length, such as HFDataset'
            continue
        for name in ('sampler', 'batch_sampler'):
            if loader.get(name) is not None or name == 'sampler' and name not in loader:
                yield (f'{key}.{name} must be None, because {stream} has an order of its own (dataset.shuffle); write '
                       f'it out: {key}=dict({name}=None)')
        loop = cfg.get('train_cfg') or {}
        if is_type(loop, EpochBasedTrainLoop, LOOPS) or loop.get('by_epoch') is True:
            yield (f'{key}.dataset.type={stream!r} has no end, and train_cfg counts epochs: take '
                   "train_cfg=dict(type='IterBasedTrainLoop', max_iters=...)")


def _of_optimizers(optim_wrapper: Any, method: type[DiffusionModel]) -> Iterator[str]:
    if not isinstance(optim_wrapper, Mapping):
        return
    roles = ', '.join(method.trains)
    if class_of(optim_wrapper.get('constructor'), OPTIM_WRAPPER_CONSTRUCTORS) is None:
        yield ("optim_wrapper needs constructor='DistillationOptimWrapperConstructor' and one entry a role: "
               f'{roles}')
    elif is_type(optim_wrapper['constructor'], DistillationOptimWrapperConstructor, OPTIM_WRAPPER_CONSTRUCTORS):
        key = next((key for key in OF_ONE_WRAPPER if key in optim_wrapper), None)
        if key is not None:
            yield (f'optim_wrapper.{key}={optim_wrapper[key]!r} is meant for one optimizer, but there is one a role '
                   f"({roles}): set optim_wrapper.{method.trains[0]}.{key}; for mixed precision type='AmpOptimWrapper' "
                   "and dtype='bfloat16' of each role, or `cdm train --amp`")
