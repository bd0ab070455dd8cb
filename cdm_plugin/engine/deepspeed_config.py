"""DeepSpeed's config: what of it a strategy with two engines takes, and where else the rest is said."""
import copy
import json
import logging
import warnings
from pathlib import Path
from typing import Any

from mmengine.device import get_device
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIMIZERS

from cdm_plugin.errors import did_you_mean

# Arguments of MMEngine's BaseStrategy.
OWN_KEYS = {'work_dir', 'experiment_name', 'env_kwargs', 'log_kwargs', 'auto_scale_lr'}
# Keys of DeepSpeed that would contradict the rest of the config, and where to say it instead.
ELSEWHERE = dict(
    gradient_clipping='optim_wrapper.<role>.clip_grad=dict(max_norm=...)',
    gradient_accumulation_steps='optim_wrapper.<role>.accumulative_counts', optimizer='optim_wrapper.<role>.optimizer',
    scheduler='param_scheduler', train_batch_size='train_dataloader.batch_size (of one process)',
    fp16='strategy.bf16=dict(enabled=True): float16 overflows in these models', amp='strategy.bf16=dict(enabled=True)',
    activation_checkpointing='model.activation_checkpointing')

MISSING = "strategy needs deepspeed: pip install 'cdm_plugin[scale]'"


def settle_config(config: None | str | dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed's config, checked, of the strategy's arguments.

    Args:
        config (dict or str, optional): DeepSpeed's config, or the path of its JSON file.
        settings (dict): What is said beside it; None is not said.

    Raises:
        ValueError: For a key that cannot work, in one line.
    """
    given: dict[str, Any] = json.loads(Path(config).read_text()) if isinstance(config, str) else config or {}
    settled = {**given, **{key: copy.deepcopy(value) for key, value in settings.items() if value is not None}}
    settled.setdefault('zero_optimization', dict(stage=2))
    check_config(settled)
    return settled


def check_config(config: dict[str, Any]) -> None:
    """Checks the keys of `strategy`; `zero_optimization.stage` gets its default, 2.

    Raises:
        ValueError: For a key that cannot work, in one line.
    """
    for key, instead in ELSEWHERE.items():
        if config.get(key):
            raise ValueError(f'strategy.{key} does not go with two engines: set {instead}')
    from deepspeed.runtime import config as deepspeed_config  # DeepSpeed itself says nothing of keys that it ignores
    known = sorted({value for value in vars(deepspeed_config).values() if isinstance(value, str)})
    for key in config.keys() - {'zero_optimization', *known}:
        if hint := did_you_mean(key, known, cutoff=0.8):
            raise ValueError(f'strategy.{key} is unknown to DeepSpeed{hint}')
    zero = config['zero_optimization']
    zero.setdefault('stage', 2)
    if zero['stage'] not in (1, 2, 3):
        raise ValueError(f'strategy.zero_optimization.stage must be 1, 2 or 3, but is {zero["stage"]!r}; without '
                         "partitioning, use the plain Runner with model_wrapper_cfg=dict(type="
                         "'DistillationDataParallel')")
    for key in ('offload_optimizer', 'offload_param'):
        device = (zero.get(key) or {}).get('device', 'none')
        if device not in ('none', 'cpu'):
            raise ValueError(f"strategy.zero_optimization.{key}.device must be 'cpu' or 'none', but is {device!r}")
    if zero['stage'] < 3 and (zero.get('offload_param') or {}).get('device', 'none') != 'none':
        raise ValueError(f'strategy.zero_optimization.offload_param needs stage=3, but stage={zero["stage"]}')
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError
    try:
        DeepSpeedZeroConfig(**zero)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f'strategy.zero_optimization.{".".join(map(str, first["loc"]))}: {first["msg"]}') from None


def engine_config(config: dict[str, Any], batch_size: int, wrapper: OptimWrapper | None = None,
                  stage: int | None = None) -> dict[str, Any]:
    """DeepSpeed's config of one engine.

    Args:
        config (dict): The strategy's.
        batch_size (int): Samples of one process.
        wrapper (OptimWrapper, optional): Of the role that the engine trains. Default: a frozen network.
        stage (int, optional): Another ZeRO stage than the strategy's.
    """
    config = copy.deepcopy(config)
    config.update(train_micro_batch_size_per_gpu=batch_size, gradient_accumulation_steps=1,
                  zero_allow_untested_optimizer=True)
    config.setdefault('steps_per_print', 10**12)
    config.setdefault('zero_force_ds_cpu_optimizer', False)
    if stage is not None:
        config['zero_optimization'].pop('offload_param', None)
        config['zero_optimization']['stage'] = stage
    if wrapper is not None:
        config['gradient_accumulation_steps'] = wrapper._accumulative_counts
        config['gradient_clipping'] = float((wrapper.clip_grad_kwargs or {}).get('max_norm', 0.0))
    return config


def initialize(network: Any, config: dict[str, Any], optimizer: Any = None) -> Any:
    """A DeepSpeed engine around a network."""
    deepspeed = import_deepspeed()
    logging.getLogger('DeepSpeed').setLevel(logging.WARNING)
    return deepspeed.initialize(model=network, optimizer=optimizer, config=config, dist_init_required=False)[0]


def import_deepspeed() -> Any:
    """DeepSpeed, which only its strategy needs; its optimizers are registered with it.

    Raises:
        ImportError: If it is not installed.
    """
    try:
        import deepspeed
        from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
    except ImportError as error:
        raise ImportError(MISSING) from error
    # Each of its collectives would say so once, by torch's newer names.
    warnings.filterwarnings('ignore', message=r'`torch\.distributed\.\w+` is deprecated', category=FutureWarning)
    if get_device() == 'cpu':
        # Its first use compiles for a minute, for collectives within one machine that gloo does as well.
        deepspeed.ops.__compatible_ops__['deepspeed_shm_comm'] = False
    for optimizer in (DeepSpeedCPUAdam, FusedAdam):
        if optimizer.__name__ not in OPTIMIZERS:
            OPTIMIZERS.register_module(module=optimizer)
    return deepspeed
