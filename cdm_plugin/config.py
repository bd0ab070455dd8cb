"""Loads configs, and finds their mistakes before anything is built."""
import contextlib
import inspect
import math
import re
import time
import types
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

from annotated_types import Ge, Le
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper, _ParamScheduler
from mmengine.registry import DefaultScope
from mmengine.runner import (
    EpochBasedTrainLoop,
    FlexibleRunner,
    IterBasedTrainLoop,
    LogProcessor,
    Runner,
    TestLoop,
    ValLoop,
)
from mmengine.utils.dl_utils import set_multi_processing
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from cdm_plugin import plugins
from cdm_plugin.arguments import MAY_BE_INFINITE, Count, Limit, NotNegative, Positive, check_arguments, check_value
from cdm_plugin.errors import USER_ERRORS, describe, did_you_mean
from cdm_plugin.registry import class_of, registries
from cdm_plugin.scopes import check_clash, check_importable
from cdm_plugin.secrets import unmasked

RECIPES = Path(__file__).parent / '.mim' / 'configs'
# The keys that runners build from; what else stands at the top of a config is a variable of its author.
RUNNER_KEYS = {key for runner in (Runner, FlexibleRunner) for key in inspect.signature(runner).parameters}
RUNNER_KEYS = RUNNER_KEYS - {'cfg'} | {'model_wrapper_cfg'}
# What a training needs.
NEEDED = ('model', 'train_dataloader', 'optim_wrapper', 'train_cfg')
# Libraries whose classes are all known here.
LIBRARIES = {'mmengine', 'cdm_plugin'}
# Those whose annotations can be relied on.
CHECKED = LIBRARIES | {'torch'}
# Keys that MMEngine's builders and runners take away before a class sees them.
BUILDER_KEYS = {'type', '_scope_', 'priority', 'data_preprocessor', 'constructor', 'paramwise_cfg', 'by_epoch',
                'convert_to_iter_based', 'num_batch_per_epoch'}


class ClipGrad(TypedDict, total=False):
    """`clip_grad` of an optimizer wrapper. An infinite `max_norm` only logs the norm."""
    type: Literal['norm', 'value']
    max_norm: Limit
    norm_type: Limit
    clip_value: Positive
    error_if_nonfinite: bool
    foreach: bool | None


class ProcessGroup(TypedDict, total=False):
    """`env_cfg.dist_cfg`: what MMEngine's `init_dist` and torch's `init_process_group` take."""
    backend: str | None
    init_backend: str
    timeout: Positive | None
    port: int | None
    init_method: str | None
    world_size: int
    rank: int
    store: Any
    group_name: str
    pg_options: Any
    device_id: Any


class Environment(TypedDict, total=False):
    """`env_cfg`."""
    cudnn_benchmark: bool
    mp_cfg: dict
    dist_cfg: ProcessGroup | None
    resource_limit: Count


RUN = dict(default_scope=str | None, log_level=str | int, default_hooks=dict[str, dict | Hook | None] | None,
           optim_wrapper=Annotated[dict, MAY_BE_INFINITE] | None, env_cfg=Environment)
# What others leave unsaid of their arguments, although a run with another value trains in vain.
RANGES: dict[Any, dict[str, Any]] = {
    Runner: RUN,
    FlexibleRunner: RUN,
    Runner.set_randomness: dict(seed=Annotated[int, Ge(0)] | None),
    IterBasedTrainLoop: dict(max_iters=Count, val_begin=Count, val_interval=Count),
    EpochBasedTrainLoop: dict(max_epochs=Count, val_begin=Count, val_interval=Count),
    OptimWrapper: dict(accumulative_counts=Count, clip_grad=ClipGrad | None),
    Optimizer: dict(lr=NotNegative, weight_decay=NotNegative, momentum=NotNegative),
    _ParamScheduler: dict(gamma=Positive, factor=Positive, eta_min=NotNegative),
    DataLoader: dict(batch_size=Annotated[int, Ge(1), Le(2**20)], num_workers=Annotated[int, Ge(0), Le(2**12)]),
}
# Dicts without a `type`, by the end of their keys.
MEANT = {'_dataloader': DataLoader, 'randomness': Runner.set_randomness, 'val_cfg': ValLoop, 'test_cfg': TestLoop,
         'env_cfg.mp_cfg': set_multi_processing, 'log_processor': LogProcessor}
# Dicts that have to have one.
TYPED = re.compile('|'.join([
    'model', r'model\.backbone', 'strategy', 'model_wrapper_cfg', r'custom_hooks\[\d+\]', r'default_hooks\.\w+',
    r'.*vis_backends\[\d+\]', r'param_scheduler(\.\w+)?(\[\d+\])?', r'optim_wrapper\.\w+\.optimizer',
    r'.*\.pipeline\[\d+\]', r'\w+_dataloader\.(dataset|sampler|batch_sampler)']))
# Entries that MMEngine builds, each from a dict.
ITEM = re.compile(r'param_scheduler(\.\w+)?\[\d+\]|.*\.pipeline\[\d+\]|.*vis_backends\[\d+\]')
DEFAULT_HOOKS = ('runtime_info', 'timer', 'sampler_seed', 'logger', 'param_scheduler', 'checkpoint')


def find_config(path: str) -> str:
    """A config's file: a path, or the name of a shipped recipe such as `digits/cdm_sd3-digits_1xb32_4step_800.py`.

    Raises:
        FileNotFoundError: If it is neither; the message has the recipe that was probably meant.
    """
    if Path(path).is_file():
        return path
    name = path.split('::')[-1]
    for candidate in (name, name + '.py', name.removeprefix('configs/')):
        if (RECIPES / candidate).is_file():
            return str(RECIPES / candidate)
    shipped = sorted(p.relative_to(RECIPES).as_posix() for p in RECIPES.glob('[!_]*/*.py'))
    raise FileNotFoundError(f'config {path!r} is no file and no shipped recipe (`cdm configs` lists them)'
                            f'{did_you_mean(name, shipped)}')


def load_config(path: str, options: dict[str, Any] | None = None, keys: Collection[str] = RUNNER_KEYS) -> Config:
    """Reads a config as `read_config` does and checks it.

    Args:
        path (str): A file, or the name of a shipped recipe.
        options (dict, optional): Changes of it, dotted key -> value.
        keys (Collection[str]): What is used of it, and so checked. Default: all that a training uses.

    Raises:
        FileNotFoundError: If there is no such config.
        ValueError: If the config has a mistake that `check_config` finds.
    """
    cfg = read_config(path, options)
    check_config(cfg, keys)
    return cfg


def read_config(path: str, options: dict[str, Any] | None = None) -> Config:
    """The same without the check. Masked secrets, of a config that a run has written down, count as not given. From
    here on its types are looked up in its `default_scope`, as MMEngine's runner has it: whatever a command builds
    later, it is of the config that was read last."""
    file = find_config(path)
    try:
        cfg = unmasked(Config.fromfile(file))
    except (Exception, SystemExit) as error:  # a config is a program
        raise ValueError(f'{_place(error, file)}: {type(error).__name__}: {error}') from error
    for key, value in (options or {}).items():
        try:
            cfg.merge_from_dict({key: value})
        except Exception as error:
            raise ValueError(f'the option {key} does not go with the config: {describe(error)}') from error
    scope = cfg.get('default_scope', 'mmengine')
    check_value(scope, str | None, 'default_scope')
    if scope is not None:
        DefaultScope.get_instance(f'config-{time.time_ns()}', scope_name=scope)
    return cfg


def _place(error: BaseException, file: str) -> str:
    """The file, of a config and those that it is made of, in which reading it has failed, and the line."""
    place, line = error.__traceback__, getattr(error, 'lineno', None)
    while place is not None:
        frame, number, place = place.tb_frame, place.tb_lineno, place.tb_next
        if frame.f_code.co_name == '<module>':
            file, line = frame.f_code.co_filename, number
        elif frame.f_globals.get('__name__') == 'mmengine.config.config':
            if frame.f_code.co_name != '_get_base_files':  # of a copy
                file = frame.f_locals.get('filename', file)
    return f'{file}, line {line}' if line else str(file)


def check_config(cfg: Config, keys: Collection[str] = RUNNER_KEYS) -> None:
    """Checks what the runner builds from: `check_parts`, and that a training has all that it needs.

    Args:
        cfg (Config): The config.
        keys (Collection[str]): What is checked of it. Default: all.

    Raises:
        ValueError: One line that names the key and what was probably meant.
    """
    for key in NEEDED:
        if key in keys and key not in cfg:
            raise ValueError(f'the config has no {key!r}: a training config needs {", ".join(NEEDED)}'
                             f'{did_you_mean(key, cfg)}')
    check_parts(cfg, keys)


def check_parts(cfg: Config, keys: Collection[str] = RUNNER_KEYS) -> None:
    """Checks every dict with a `type` from which the runner builds: the type exists, and the classes of this package,
    of plug-ins, of MMEngine and of torch take its keys and values. A type that another library should have is left to
    MMEngine.

    Raises:
        ValueError: One line that names the key and what was probably meant.
    """
    values = cfg.to_dict()
    for key in values:
        _check_name(key, RUNNER_KEYS, f'{key} is no key of a runner')
    scope = cfg.get('default_scope', 'mmengine')
    given = {key: value for key, value in values.items() if key in keys and key in RUNNER_KEYS}
    runner = Runner if cfg.get('strategy') is None else FlexibleRunner
    check_arguments(runner, given, '', RANGES[runner], more=None)
    for key in given.get('default_hooks') or ():
        _check_name(key, DEFAULT_HOOKS, f'default_hooks.{key} is no default hook')
    with DefaultScope.overwrite_default_scope(scope):
        for key, value in given.items():
            _check(value, key, scope is None or scope in LIBRARIES)


def _check_name(key: str, known: Collection[str], what: str) -> None:
    """Refuses what is almost a known name. One like `model_2` or `dataloader` is the config's author's own."""
    near = did_you_mean(key, sorted(known), cutoff=0.85)
    if key not in known and near and not any(f'_{k}_' in f'_{key}_' or f'_{key}_' in f'_{k}_' for k in known):
        raise ValueError(f'{what}{near} What is your own needs another name')


def check_part(value: Any, path: str) -> None:
    """The same for a part of a config, whose key is `path`."""
    _check(value, path, known=True)


def _check(value: Any, path: str, known: bool) -> None:
    """Checks a value and what is below it; `known`: whether a name without a scope must be found here."""
    if isinstance(value, dict):
        if path == 'optim_wrapper' and 'constructor' in value:
            pass  # by role
        elif isinstance(value.get('type'), str) or callable(value.get('type')):
            known = _check_part(path, value, known) and known
        elif TYPED.fullmatch(path) and not (
                path.startswith('param_scheduler') and all(isinstance(v, (dict, list)) for v in value.values())):
            raise ValueError(f'{path} needs a type, but has {", ".join(map(str, value)) or "nothing"}')
        elif function := _meant(path, value):
            _check_values(path, value, function)
        for key, child in value.items():
            if key not in ('metainfo', 'clip_grad'):  # the user's own data; the `type` of the other is none
                _check(child, f'{path}.{key}', known)
    elif ITEM.fullmatch(path) and isinstance(value, (int, float, str, list, tuple, types.NoneType)):
        raise ValueError(f'{path} must be a dict with a type, but is {value!r}')
    elif isinstance(value, (list, tuple)):
        for i, child in enumerate(value):
            _check(child, f'{path}[{i}]', known)
    elif isinstance(value, float) and math.isnan(value):  # an infinite number may be a limit
        raise ValueError(f'{path} must be a number, but is nan')


def _check_part(path: str, part: dict[str, Any], known: bool) -> bool:
    """Checks one dict with a `type`.

    Returns:
        bool: Whether types below it must be found here too. What a class of another library does with the dicts that
        it is given is its business: `mmdet.Albu` hands them to albumentations.
    """
    name = part['type']
    found = {cls for registry in registries() if (cls := class_of(part, registry)) is not None}
    if not found:
        check_importable(name)
    check_clash(path, part)
    if not found and (known if '.' not in name else name.split('.')[0] in LIBRARIES):
        names = {n for registry in registries() for n in registry.module_dict}
        raise ValueError(f'{path}.type={name!r} is not registered{did_you_mean(name.split(".")[-1], sorted(names))}'
                         f'{plugins.absent()}')
    own = [any(_library(base) == 'cdm_plugin' for base in getattr(cls, '__mro__', ())) for cls in found]
    libraries = {_library(cls) for cls in found}
    if len(found) == 1 and all(map(inspect.isclass, found)) and (own[0] or libraries <= CHECKED | _plugins()):
        _check_values(path, part, *found)
    return bool(found) and (libraries <= LIBRARIES or all(own))


def _library(cls: Any) -> str:
    return getattr(cls, '__module__', '').split('.')[0]


def _plugins() -> set[str]:
    return {info.module.split('.')[0] for info in plugins.loaded()}


def _check_values(path: str, part: dict[str, Any], function: Callable[..., Any]) -> None:
    """Checks the keys and values of a part by what will be made of it."""
    bases = reversed(getattr(function, '__mro__', (function,)))
    ranges = {name: hint for base in bases for name, hint in RANGES.get(base, {}).items()}
    values = {key: value for key, value in part.items() if key not in ('type', '_scope_')}
    if _library(function) in {'mmengine', 'torch'}:  # MMEngine takes 4e3 for a whole number
        values = {key: int(value) if isinstance(value, float) and value.is_integer() else value
                  for key, value in values.items()}
    more = BUILDER_KEYS | (function.more_keys() if hasattr(function, 'more_keys') else set())
    check_arguments(function, values, path, ranges, None if getattr(function, 'hands_on_keys', False) else more)


def _meant(path: str, part: dict[str, Any]) -> Callable[..., Any] | None:
    """What MMEngine makes of a dict without a `type`."""
    if path == 'train_cfg':
        return EpochBasedTrainLoop if part.get('by_epoch') else IterBasedTrainLoop
    if path.startswith('optim_wrapper') and 'optimizer' in part:
        return OptimWrapper
    return next((function for end, function in MEANT.items() if path.endswith(end)), None)


@contextlib.contextmanager
def naming_parts(cfg: Config) -> Iterator[None]:
    """An error while MMEngine builds a part of a config names the part's key.

    Raises:
        ValueError: In place of an error that does not name it.
    """
    try:
        yield
    except Exception as error:
        path = _failed_part(error, cfg)
        if path is None or isinstance(error, USER_ERRORS) and path in str(error):
            raise
        raise ValueError(f'{path}: {describe(error)}') from error


def _failed_part(error: Exception, cfg: Config) -> str | None:
    """The key of the innermost part that MMEngine was building."""
    places = dict(_parts(cfg.to_dict(), ''))
    found, place = None, error.__traceback__
    while place is not None:
        frame, code, place = place.tb_frame, place.tb_frame.f_code, place.tb_next
        if frame.f_globals.get('__name__', '').startswith('mmengine.') and 'build' in code.co_name:
            for name in code.co_varnames[:code.co_argcount]:
                value = frame.f_locals.get(name)
                if isinstance(value, (dict, Config)) and value:
                    plain = value.to_dict() if hasattr(value, 'to_dict') else value
                    # What is built may have got more, such as an optimizer its parameters.
                    same = [path for path, part in places.items() if part and all(
                        key in plain and type(v) is type(plain[key]) and v == plain[key] for key, v in part.items())]
                    found = max(same, key=lambda path: len(places[path]), default=found)
    return found


def _parts(value: Any, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(value, dict):
        yield path, value
        for key, part in value.items():
            yield from _parts(part, f'{path}.{key}'.removeprefix('.'))
    elif isinstance(value, (list, tuple)):
        for i, part in enumerate(value):
            yield from _parts(part, f'{path}[{i}]')
