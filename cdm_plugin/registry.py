"""What a config's `type` means: a name, a scoped name, an import path and the class itself are one class."""
import contextlib
import importlib
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine import registry as root
from mmengine.registry import METRICS, MODELS, TASK_UTILS, DefaultScope, Registry

from cdm_plugin import plugins
from cdm_plugin.arguments import check_arguments

# Where the parts of a model are registered, which files name: METRICS are the judges of losses.
FILE_REGISTRIES = (MODELS, TASK_UTILS, METRICS)


def class_of(cfg: Any, registry: Registry | None = None) -> Any:
    """The class that a `type` means, found as MMEngine's builder finds it. Compare classes, never strings.

    Args:
        cfg (dict or str or type): A config with a `type`, or the type itself: a registered name ('CDM', looked up under
            the default scope), a scoped name ('mmengine.SGD'), an import path ('torch.optim.SGD') or the class.
        registry (Registry, optional): Where names are looked up. Default: MMEngine's root registries, one by one.

    Returns:
        type or Callable or None: None if there is no `type` or nothing of that name. A name without a dot is looked up
        and never imported.
    """
    kind, scope = cfg, None
    if isinstance(cfg, Mapping):
        kind, scope = cfg.get('type'), cfg.get('_scope_')
    if not isinstance(kind, str):
        return kind if callable(kind) else None
    for place in registries() if registry is None else [registry]:
        # A package of that scope, or a module on that path, may fail in any way; building it will say how.
        with contextlib.suppress(Exception):
            found = _find(kind, _scoped(place, scope))
            if found is not None:
                return found
    return None


def is_type(cfg: Any, cls: type | tuple[type, ...], registry: Registry | None = None) -> bool:
    """Whether a `type`, given as for `class_of`, means a class (or one of several) or a subclass of it."""
    found = class_of(cfg, registry)
    return inspect.isclass(found) and issubclass(found, cls)


def registered(kind: Any, registry: Registry) -> Any:
    """The class that a file's `type` means, if this package or a loaded plug-in has registered it.

    For files that are no configs (checkpoints, exported folders, caches, logs), which may be somebody else's: MMEngine
    imports any dotted path and calls what it finds there, and this imports nothing.

    Args:
        kind (str): A registered name, with or without MMEngine's scope, or the import path of a registered class.
        registry (Registry): The root registry to look it up in.

    Returns:
        type or Callable or None: None for anything else, MMEngine's own classes among it.
    """
    place, _, name = kind.rpartition('.') if isinstance(kind, str) else ('', '', '')
    found = registry.module_dict.get(name)
    if place not in ('', registry.scope) and getattr(sys.modules.get(place), name, None) is not found:
        return None
    return found if _is_ours(name, found, registry) else None


def _is_ours(name: str, found: Any, registry: Registry) -> bool:
    """Whether a registered class is this package's, one derived from them, or a loaded plug-in's."""
    if any(base.__module__.split('.')[0] == 'cdm_plugin' for base in getattr(found, '__mro__', ())):
        return True
    place = next((key for key, value in vars(root).items() if value is registry), '')
    return any(f'{place}.{name}' in info.registered for info in plugins.loaded())


def checked_types(value: Any, source: str | Path, key: str) -> Any:
    """Data of a file that is no config, for a registry to build from: whatever it builds is `registered`.

    Args:
        value (Any): Nested dicts and lists of plain data.
        source (str or Path): The file, named in errors.
        key (str): Where the value stands in it.

    Returns:
        Any: The same data, each `type` as the name that it is registered by.

    Raises:
        ValueError: If a `type`, at any depth, is anything else, has arguments that its class does not declare or of
            other kinds than it declares, or if there is a `_scope_`, which makes MMEngine import a package. It names
            the file and the key.
    """
    if isinstance(value, (list, tuple)):
        return type(value)([checked_types(child, source, f'{key}[{i}]') for i, child in enumerate(value)])
    if not isinstance(value, Mapping):
        return value
    if '_scope_' in value:
        raise ValueError(f'{source}: {key}._scope_={value["_scope_"]!r} is refused: only a config may name a scope')
    checked = {name: checked_types(child, source, f'{key}.{name}') for name, child in value.items() if name != 'type'}
    if 'type' not in value:
        return checked
    kind = value['type']
    cls = next((cls for registry in FILE_REGISTRIES if (cls := registered(kind, registry)) is not None), None)
    if cls is None:
        names = [name for registry in FILE_REGISTRIES for name, known in registry.module_dict.items()
                 if _is_ours(name, known, registry)]
        raise ValueError(f'{source}: {key}.type={kind!r} is refused: a file that is no config may name only what '
                         f'cdm_plugin and loaded plug-ins have registered: {", ".join(sorted(names))}'
                         f'{plugins.absent()}')
    check_arguments(cls, checked, f'{source}: {key}')
    return dict(type=kind.rpartition('.')[2], **checked)


def registries() -> list[Registry]:
    """MMEngine's root registries."""
    return [value for value in vars(root).values() if isinstance(value, Registry)]


def _scoped(registry: Registry, scope: str | None) -> Registry:
    """The registry that MMEngine builds from under a scope, by default the current one; without its warnings."""
    if scope is None:
        current = DefaultScope.get_current_instance()
        scope = registry.scope if current is None else current.scope_name
    with contextlib.suppress(ImportError):
        importlib.import_module(f'{scope}.registry')
    found = registry.root._search_child(scope)
    return registry if found is None else found  # an empty registry counts as False


def _find(name: str, registry: Registry) -> Any:
    if '.' in name:
        found = registry.get(name)
        return found if callable(found) else None
    registry.import_from_location()
    place: Registry | None = registry
    while place is not None and name not in place.module_dict:
        place = place.parent
    return None if place is None else place.module_dict[name]
