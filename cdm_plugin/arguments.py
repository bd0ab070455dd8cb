"""Checks the arguments of a class by what its constructor declares: the annotations, with ranges in `typing.Annotated`.

    def __init__(self, low: Share = 0.02, points: Literal['noised', 'on-trajectory'] = 'noised') -> None:

Every class that this package or a plug-in registers is checked whenever it is made (`guard`), and with its place in the
config before anything is made (`cdm_plugin.config`). A float must be finite unless it is annotated as `Limit`.
"""
import collections.abc
import contextlib
import functools
import inspect
import math
import numbers
import operator
import os
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal, TypedDict, Union

from annotated_types import Ge, Gt, Le, Lt

from cdm_plugin.errors import did_you_mean

STANDARD = ('builtins', 'collections.abc')
MAY_BE_INFINITE = object()
Count = Annotated[int, Ge(1)]
NotNegative = Annotated[float, Ge(0)]
Positive = Annotated[float, Gt(0)]
Limit = Annotated[float, Gt(0), MAY_BE_INFINITE]
Share = Annotated[float, Ge(0), Le(1)]
Decay = Annotated[float, Ge(0), Lt(1)]

Declared = dict[str, tuple[Any, Any]]
TypedDictMeta = type(TypedDict('TypedDictMeta', {}))  # type: ignore[operator]
NUMBERS = {bool: bool, int: numbers.Integral, float: numbers.Real}
WORDS = {bool: 'True or False', int: 'whole number', float: 'number', str: 'text', dict: 'dict', types.NoneType: 'None'}
ENDS = {Ge: ('ge', operator.ge), Gt: ('gt', operator.gt), Le: ('le', operator.le), Lt: ('lt', operator.lt)}
ENDS_IN_WORDS = dict(ge='of {} or more', gt='above {}', le='of {} or less', lt='below {}')


@functools.lru_cache(maxsize=None)
def declared(function: Callable[..., Any]) -> tuple[Declared, bool]:
    """What a function, or a class's constructor with those that it hands its keywords to, takes.

    Returns:
        tuple: Annotation and default by name, and whether it takes any other keyword as well.
    """
    known: Declared = {}
    steps = [function] if not inspect.isclass(function) else [
        vars(base)['__init__'] for base in function.__mro__[:-1] if '__init__' in vars(base)]
    for step in steps:
        parameters = inspect.signature(step).parameters.values()
        hints = _hints(step)
        for p in parameters:
            if p.name != 'self' and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL):
                known.setdefault(p.name, (hints.get(p.name, _like(p.default)), p.default))
        if all(p.kind is not p.VAR_KEYWORD for p in parameters):
            return known, False
    return known, True


def _like(default: Any) -> Any:
    """What stands for the annotation that an argument with a default lacks."""
    if isinstance(default, (bool, int, float)):
        return bool if isinstance(default, bool) else float | None
    return Any


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    for names in (None, vars(collections.abc)):  # which torch's DataLoader imports for type checkers only
        with contextlib.suppress(Exception):
            return typing.get_type_hints(function, None, names, include_extras=True)
    return {}


def check_arguments(function: Callable[..., Any], given: Mapping[str, Any], path: str,
                    ranges: Mapping[str, Any] = types.MappingProxyType({}), more: Iterable[str] | None = ()) -> None:
    """Checks arguments by name.

    Args:
        function (Callable): The class or function that they are for.
        given (Mapping): The arguments.
        path (str): Where they stand, for the message: 'model.losses.ca', or the name of the class.
        ranges (Mapping): Annotations that replace the function's own. Default: none.
        more (Iterable[str], optional): Names that may be given beside those that are declared; None for any.

    Raises:
        ValueError: One line that names the argument, says what it must be and what it is.
    """
    known, takes_any = declared(function)
    for name, value in given.items():
        where = f'{path}.{name}' if path else name
        if name in ranges or name in known:
            hint, default = known.get(name, (Any, None))
            if value is not default:
                check_value(value, ranges.get(name, hint), where)
        elif more is not None and name not in more:
            # Where any name may be given, one that is almost a known one is a mistake all the same.
            near = did_you_mean(name, sorted(known), cutoff=0.85 if takes_any else 0.6)
            if near or not takes_any:
                raise ValueError(f'{where} is unknown: {function.__name__} takes {", ".join(sorted(known))}{near}')


def check_value(value: Any, hint: Any, path: str) -> None:
    """Checks one value by an annotation; a dict with a `type` may stand for an object that will be built of it.

    Raises:
        ValueError: One line that names `path`, or the part of the value that is wrong.
    """
    if fits(value, hint):
        return
    kinds = [kind for kind in _alternatives(hint) if kind is not types.NoneType]
    kind, inner = kinds[0], typing.get_args(kinds[0])
    if len(kinds) == 1 and isinstance(value, Mapping) and isinstance(kind, TypedDictMeta):
        hints = typing.get_type_hints(kind, include_extras=True)
        for name in value:
            if name not in hints:
                raise ValueError(f'{path}.{name} is unknown: it takes {", ".join(hints)}{did_you_mean(name, hints)}')
            check_value(value[name], hints[name], f'{path}.{name}')
        raise ValueError(f'{path} has no {min(kind.__required_keys__ - value.keys())}')
    if isinstance(value, Mapping) and (wrong := not_finite(value, path)):
        raise ValueError(f'{wrong[0]} must be a finite number, but is {wrong[1]}')
    if len(kinds) == 1 and isinstance(value, (list, tuple)):
        for i, part in enumerate(value):
            if len(inner) in (1, len(value)) and ... not in inner:
                check_value(part, inner[i if len(inner) > 1 else 0], f'{path}[{i}]')
    wanted = in_words(hint)
    if isinstance(value, float) and not math.isfinite(value):
        wanted = wanted.replace('number', 'finite number', 1)
    raise ValueError(f'{path} must be {wanted}, but is {value!r}')


def fits(value: Any, hint: Any, infinite: bool = False) -> bool:
    """Whether a value is what an annotation says. Lists stand for tuples and other sequences, and nothing is iterated
    over but lists and tuples. Numbers must be finite, in a dict at any depth, unless they may be `infinite`."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        rules = [(ENDS[type(m)], m) for m in inner[1:] if type(m) in ENDS]
        return fits(value, inner[0], infinite or MAY_BE_INFINITE in inner[1:]) and all(
            rule(value, getattr(m, end)) for (end, rule), m in rules)
    if origin in (Union, types.UnionType):
        return any(fits(value, kind, infinite) for kind in inner)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in inner)
    if hint in NUMBERS:
        return isinstance(value, NUMBERS[hint]) and (hint is bool or not isinstance(value, bool)) and (
            hint is not float or infinite or math.isfinite(value))  # type: ignore[arg-type]
    if hint is None or hint is types.NoneType:
        return value is None
    if isinstance(hint, TypedDictMeta):
        hints = typing.get_type_hints(hint, include_extras=True)
        return isinstance(value, Mapping) and hint.__required_keys__ <= value.keys() and all(
            name in hints and fits(part, hints[name]) for name, part in value.items())
    kind = origin or hint
    if not inspect.isclass(kind):  # Any, a TypeVar
        return True
    if kind is str:
        return isinstance(value, (str, os.PathLike))
    if isinstance(value, Mapping) and issubclass(kind, Mapping):
        return (infinite or not_finite(value) is None) and (
            len(inner) != 2 or all(fits(part, inner[1], infinite) for part in value.values()))
    standard = kind.__module__ in STANDARD
    if isinstance(value, (list, tuple)) and standard and issubclass(kind, Iterable) and not issubclass(kind, Mapping):
        fixed = kind is tuple and inner and inner[-1] is not ...
        return len(value) == len(inner) and all(map(fits, value, inner)) if fixed else (
            not inner or all(fits(part, inner[0]) for part in value))
    if isinstance(value, (str, Mapping)) and issubclass(kind, Iterable) and standard:
        return False
    if isinstance(value, Mapping) and 'type' in value:
        return True
    try:
        return isinstance(value, kind)
    except TypeError:  # a protocol
        return True


def not_finite(value: Any, path: str = '') -> tuple[str, float] | None:
    """The first number that is NaN or infinite, at any depth of a config's dicts and lists, and its place."""
    if isinstance(value, float):
        return None if math.isfinite(value) else (path, value)
    parts = value.items() if isinstance(value, Mapping) else (
        enumerate(value) if isinstance(value, (list, tuple)) else ())
    return next(filter(None, (not_finite(part, f'{path}.{name}') for name, part in parts)), None)


def in_words(hint: Any, many: bool = False) -> str:
    """What an annotation asks for: 'a number', or with `many` 'numbers'."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        ends = {ENDS[type(m)][0]: getattr(m, ENDS[type(m)][0]) for m in inner[1:] if type(m) in ENDS}
        if len(ends) == 2:
            (low, start), (high, end) = sorted(ends.items())
            brackets = f'{"[" if low == "ge" else "("}{start}, {end}{"]" if high == "le" else ")"}'
            return f'{in_words(inner[0], many)} in {brackets}'
        return ' '.join([in_words(inner[0], many), *(ENDS_IN_WORDS[end].format(v) for end, v in ends.items())])
    if origin in (Union, types.UnionType):
        kinds = sorted(inner, key=lambda kind: kind is types.NoneType)
        return ' or '.join(dict.fromkeys(in_words(kind, many) for kind in kinds))
    if origin is Literal:
        return ' or '.join(map(repr, inner))
    if isinstance(hint, TypedDictMeta) or inspect.isclass(origin) and issubclass(origin, Mapping):
        hint = dict
    if inspect.isclass(origin) and issubclass(origin, Iterable) and hint is not dict:
        kinds = list(dict.fromkeys(in_words(kind, many=True) for kind in inner if kind is not ...))
        return ' of '.join(['lists' if many else 'a list', *filter(None, [' and '.join(kinds)])])
    word = WORDS.get(hint, getattr(hint, '__name__', str(hint)))
    return f'{word}s' if many and hint in WORDS else word if word[:1].isupper() else f'a {word}'


def _alternatives(hint: Any) -> list[Any]:
    return list(typing.get_args(hint)) if typing.get_origin(hint) in (Union, types.UnionType) else [hint]


def guard(cls: Any, package: str) -> None:
    """Lets a class, and its bases of the same package, check their arguments whenever they are made."""
    for base in getattr(cls, '__mro__', ()):
        own = vars(base).get('__init__')
        if inspect.isfunction(own) and not hasattr(own, 'checked') and base.__module__.split('.')[0] == package:
            base.__init__ = checked(own)


def checked(init: Callable[..., None]) -> Callable[..., None]:
    """A constructor that checks its arguments first. They are named by the class, or by the key that its `config_key`
    says it has in every config."""
    signature = inspect.signature(init)

    @functools.wraps(init)
    def checking(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            given = signature.bind(self, *args, **kwargs).arguments
        except TypeError:
            given = {}  # the call below says what is wrong
        check_arguments(init, {name: v for name, v in given.items() if name != 'self'},
                        getattr(self, 'config_key', type(self).__name__), more=None)
        init(self, *args, **kwargs)

    checking.checked = True  # type: ignore[attr-defined]
    return checking
