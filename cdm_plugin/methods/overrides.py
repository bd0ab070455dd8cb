"""How a config changes a method's parts: single arguments of a default, another type in its place, or None for none.

What a sibling of the family has and a method lacks is left aside with a line in the log, so that changing `model.type`
alone swaps methods.
"""
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from mmengine.logging import print_log
from mmengine.registry import MODELS, TASK_UTILS, Registry

from cdm_plugin.config import check_part
from cdm_plugin.errors import did_you_mean
from cdm_plugin.losses.direction import CALoss, CDMLoss, DMLoss, TDMLoss
from cdm_plugin.losses.gan import GANLoss
from cdm_plugin.registry import class_of, registered
from cdm_plugin.time_grids import DynamicTimeGrid, FixedTimeGrid

# The terms that some method of the family has, or some recipe, and what they are there.
FAMILY_TERMS: dict[str, tuple[type, ...]] = dict(ca=(CALoss,), dm=(DMLoss, TDMLoss), cdm=(CDMLoss,), gan=(GANLoss,))


def subclasses(cls: type[Any]) -> set[type[Any]]:
    """A class and all that inherit from it."""
    return {cls}.union(*(subclasses(child) for child in cls.__subclasses__()))


def arguments_of(family: type) -> set[str]:
    """What the constructors of a class, and of all that inherit from it, take by name."""
    signatures = (inspect.signature(vars(cls)['__init__']) for cls in subclasses(family) if '__init__' in vars(cls))
    return {p.name for signature in signatures for p in signature.parameters.values()
            if p.kind is not p.VAR_KEYWORD and p.name != 'self'}


def leave_aside(method: type, siblings: Mapping[str, Any], family: type) -> None:
    """Arguments of a method that only another one of the family takes: a line in the log for each.

    Raises:
        ValueError: If none of them does.
    """
    for key in siblings:
        known = arguments_of(family)
        if key not in known:
            raise ValueError(f'model.{key} is unknown: no method takes it{did_you_mean(key, sorted(known))}')
        print_log(f'model.{key} does not apply to {method.__name__}: left aside', 'current')


def with_defaults(key: str, value: Any, method: Any) -> Any:
    """A setting of `model` as it counts: the method's default if it is left out, and each part with the defaults of
    what it does not say. Losses and time grids that are left out are not filled in.

    Args:
        key (str): Its name.
        value: What a config has, None if nothing.
        method (type): The method.
    """
    if value is None and inspect.isclass(method):
        parameter = inspect.signature(method).parameters.get(key)
        value = None if parameter is None else parameter.default
        default = getattr(method, f'default_{key}', None)
        value = default if value is None and not callable(default) else value
    return _filled(value)


def _filled(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_filled(child) for child in value]
    if not isinstance(value, Mapping):
        return value
    # One side may be read from a checkpoint: nothing is imported.
    cls = registered(value.get('type'), MODELS) or registered(value.get('type'), TASK_UTILS)
    defaults = {p.name: p.default for p in inspect.signature(cls).parameters.values()
                if p.default is not p.empty} if inspect.isclass(cls) else {}
    return {name: _filled(child) for name, child in {**defaults, **value}.items()}


def override_part(default: Mapping[str, Any], override: Any, registry: Registry, path: str) -> dict[str, Any]:
    """A part's config: replaced if the override names another class, changed in single arguments otherwise."""
    if not isinstance(override, dict):
        raise ValueError(f'{path} must be a dict such as {dict(default)}, but is {override!r}')
    replaces = 'type' in override and class_of(override, registry) is not (
        class_of(default, registry) if default else None)
    part = dict(override) if replaces else {**default, **override}
    check_part(part, path)
    return part


def override_time_grid(default: dict[str, Any], override: dict[str, Any]) -> dict[str, Any]:
    """The time grid's config."""
    override = _without_siblings(default, override, (FixedTimeGrid, DynamicTimeGrid), TASK_UTILS, 'model.time_grid')
    return override_part(default, override, TASK_UTILS, 'model.time_grid')


def _without_siblings(default: Mapping[str, Any], override: Any, siblings: Sequence[type], registry: Registry,
                      path: str) -> Any:
    """An override without the arguments that only a sibling of the default's class takes."""
    if not isinstance(override, dict) or not default or 'type' in override:
        return override
    known = set(inspect.signature(class_of(default, registry)).parameters)
    theirs = {key for sibling in siblings for key in inspect.signature(sibling).parameters} - known
    for key in sorted(override.keys() & theirs):
        print_log(f'{path}.{key} does not apply to {default["type"]}: left aside', 'current')
    return {key: value for key, value in override.items() if key not in theirs}


def override_losses(method: str, defaults: dict[str, dict[str, Any]], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The losses' configs by name.

    Args:
        method (str): The method's name, for messages.
        defaults (dict): The method's losses by name.
        overrides (dict): `model.losses`.

    Raises:
        ValueError: For a name that nothing has, or if nothing is left.
    """
    configs = dict(defaults)
    for name, override in overrides.items():
        if name not in configs and not (isinstance(override, dict) and 'type' in override):
            if name not in FAMILY_TERMS:
                raise ValueError(f'model.losses.{name} is unknown: {method} has {sorted(configs)}; give a type to add '
                                 'a loss')
            print_log(f'model.losses.{name} does not apply to {method}: left aside', 'current')
        elif override is None:
            del configs[name]
        else:
            default, path = configs.get(name, {}), f'model.losses.{name}'
            override = _without_siblings(default, override, FAMILY_TERMS.get(name, ()), MODELS, path)
            configs[name] = override_part(default, override, MODELS, path)
    if not configs:
        raise ValueError('model.losses removes every loss: at least one must stay')
    return configs
