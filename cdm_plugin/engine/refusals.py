"""What of MMEngine does not go with the methods, and the key to use in its place."""
from collections.abc import Iterator, Mapping
from typing import Any

from mmengine._strategy import SingleDeviceStrategy
from mmengine.dataset import InfiniteSampler
from mmengine.registry import (
    DATA_SAMPLERS,
    DATASETS,
    LOOPS,
    MODEL_WRAPPERS,
    MODELS,
    OPTIM_WRAPPER_CONSTRUCTORS,
    STRATEGIES,
)
from mmengine.runner import EpochBasedTrainLoop

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


def refusals(cfg: Mapping[str, Any]) -> Iterator[str]:
    """One line for each of a config's settings with which training would fail, hang or differ from what was meant.

    The one list of them: `cdm train` and CDMHook end a run with the first, `cdm doctor` names all.

    Args:
        cfg (Mapping): A config of MMEngine's runner; nothing is built from it. What it does not say is not judged.
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
    strategy = class_of(cfg.get('strategy'), STRATEGIES)
    if strategy is not None and strategy is not SingleDeviceStrategy and not is_type(
            strategy, DistillationDeepSpeedStrategy):
        yield (f'strategy.type={strategy.__name__!r} wraps one network with one optimizer: take {SHARDS}, or {COPIES} '
               'without a strategy')
    loader, loop = cfg.get('train_dataloader') or {}, cfg.get('train_cfg') or {}
    yield from _of_streams(cfg)
    by_epoch = is_type(loop, EpochBasedTrainLoop, LOOPS) or loop.get('by_epoch') is True
    if by_epoch and is_type(loader.get('sampler'), InfiniteSampler, DATA_SAMPLERS):
        yield ("train_dataloader.sampler.type='InfiniteSampler' has no end, and train_cfg counts epochs: take "
               "train_cfg=dict(type='IterBasedTrainLoop', max_iters=...), or DefaultSampler")


def _of_streams(cfg: Mapping[str, Any]) -> Iterator[str]:
    for split in ('train', 'val', 'test'):
        key = f'{split}_dataloader'
        loader = cfg.get(key) or {}
        if not isinstance(loader, Mapping) or not is_type(loader.get('dataset'), Stream, DATASETS):
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
