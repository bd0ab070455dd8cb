"""What a config's `default_scope` does to the names of this package: a library that does not import, names of two."""
import importlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from mmengine.registry import DefaultScope

from cdm_plugin.registry import class_of, registries


def check_importable(name: str) -> None:
    """Refuses a default scope under which MMEngine cannot even look up a registered name: it imports the modules of the
    scope's registry first.

    Args:
        name (str): A `type` without a dot.

    Raises:
        ValueError: If one of these modules does not import.
    """
    scope = DefaultScope.get_current_instance()
    for registry in registries() if scope is not None else ():
        own = registry._search_child(scope.scope_name) if name in registry.module_dict else None
        for module in () if own is None or own is registry else own._locations:
            try:
                importlib.import_module(module)
            except Exception as error:
                raise ValueError(
                    f'default_scope={scope.scope_name!r} cannot be used here: to find {name!r}, MMEngine imports '
                    f'{module}, which fails ({type(error).__name__}: {error}). Leave default_scope out, and write what '
                    f"you use of it as type='{scope.scope_name}.X', as far as its modules import") from error


def check_clash(path: str, part: Mapping[str, Any]) -> None:
    """Raises ValueError if a type is not this package's one of that name, and does not take what it is given."""
    for found, text in _clash(part):
        taken = inspect.signature(found).parameters
        wrong = [key for key in part if key != 'type' and key not in taken]
        if wrong and not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
            raise ValueError(f'{path}.{wrong[0]} is unknown: {text}')


def clashes(value: Any, path: str = '') -> Iterator[str]:
    """One line for each part, of a config or below, whose `type` is not this package's one of that name."""
    if isinstance(value, Mapping):
        yield from (f'{path}: {text}' for _, text in _clash(value))
        for key, child in value.items():
            yield from clashes(child, f'{path}.{key}'.removeprefix('.'))
    elif isinstance(value, (list, tuple)):
        for i, child in enumerate(value):
            yield from clashes(child, f'{path}[{i}]')


def _clash(part: Mapping[str, Any]) -> Iterator[tuple[Any, str]]:
    """What a `type` is under the default scope, in place of this package's one of that name, and a text that says so.
    A class derived from ours is in its place; a name with a scope before it is what it says."""
    name, scope = part.get('type'), DefaultScope.get_current_instance()
    if not isinstance(name, str) or '.' in name or '_scope_' in part or scope is None:
        return
    for registry in registries():
        ours = registry.module_dict.get(name)
        if getattr(ours, '__module__', '').split('.')[0] == 'cdm_plugin':
            found = class_of(name, registry)
            if found not in (None, ours) and not (inspect.isclass(found) and issubclass(found, ours)):
                yield found, (f'type={name!r} is {found.__module__}.{name} under default_scope={scope.scope_name!r}; '
                              f"cdm_plugin's is type='{registry.scope}.{name}'")
