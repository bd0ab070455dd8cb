"""Arguments are checked by what a class declares, wherever it is made."""
import inspect
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import numpy as np
import pytest
import torch
from annotated_types import Ge, Lt
from mmengine import registry as root
from torch import nn

from cdm_plugin import plugins
from cdm_plugin.arguments import (
    Count,
    Decay,
    Limit,
    NotNegative,
    Positive,
    Share,
    check_arguments,
    check_value,
    checked,
    declared,
    fits,
    guard,
    in_words,
)


class Clip(TypedDict, total=False):
    max_norm: Limit
    foreach: bool | None


class Shard(TypedDict):
    name: str
    rows: int


INF, NAN = math.inf, math.nan
# Annotation, what fits it, what does not, how a message names it.
KINDS = [
    (int, [0, -3, np.int64(2)], [1.0, True, '1', None], 'a whole number'),
    (float, [0, 0.5, np.float32(1)], [True, '1', None, INF, -INF, NAN], 'a number'),
    (bool, [True, False], [0, 1, 'banana', None], 'True or False'),
    (str, ['', 'a', Path('a')], [1, None, ['a'], b'a'], 'a text'),
    (Count, [1, 10**20], [0, -5, 1.5, True, 'abc', None], 'a whole number of 1 or more'),
    (Share, [0, 1, 0.5], [-0.01, 1.01, NAN, 'x'], 'a number in [0, 1]'),
    (Decay, [0, 0.999], [1, 2, -1, NAN], 'a number in [0, 1)'),
    (Positive, [1e-9, 3], [0, -1, INF, NAN], 'a number above 0'),
    (NotNegative, [0, 3.5], [-1e-9, INF], 'a number of 0 or more'),
    (Limit, [1, INF], [0, -1, NAN, 'x'], 'a number above 0'),
    (float | None, [None, 1], ['x', INF], 'a number or None'),
    (None | int | str, [None, 1, 'a'], [1.5, []], 'a whole number or a text or None'),
    (Literal['a', 1], ['a', 1], ['b', True, 1.0], "'a' or 1"),
    (Sequence[float], [[], (1, 2), [0.5]], [1, 'ab', [1, 'x'], [NAN], {'type': 'a'}], 'a list of numbers'),
    (tuple[float, float], [[0.9, 0.99], (1, 2)], [[1], [1, 2, 3], [1, 'x'], 3], 'a list of numbers'),
    (list[Count] | None, [[1], None], [[0], [1.5], 3], 'a list of whole numbers of 1 or more or None'),
    (dict[str, Any], [{}, {'a': [1, {'b': 'c'}]}], [[], None, {'a': [{'b': NAN}]}, {'a': INF}], 'a dict'),
    (Clip, [{}, {'max_norm': INF}], [{'max_norm': -1}, {'max_nrom': 1}, []], 'a dict'),
    (Callable[[int], int], [len, int, {'type': 'a'}], [3, 'len', {'a': 1}], 'Callable'),
    (nn.Module, [nn.ReLU(), {'type': 'ReLU'}], ['ReLU', {}], 'Module'),
    (Sequence[dict | Callable], [[{'a': 1}, len]], [[3], 'a'], 'a list of dicts or Callable'),
    (Any, [None, NAN, object()], [], None),
]


@pytest.mark.parametrize('hint, good, bad, words', KINDS, ids=[str(kind[0])[:40] for kind in KINDS])
def test_what_fits_an_annotation(hint, good, bad, words):
    assert [value for value in good if not fits(value, hint)] == []
    assert [value for value in bad if fits(value, hint)] == []
    for value in bad:
        with pytest.raises(ValueError, match='^there'):
            check_value(value, hint, 'there')
    assert words is None or in_words(hint) == words


def test_the_part_that_is_wrong_is_named():
    for value, hint, message in [
            ([1.0, 'x'], Sequence[float], "there[1] must be a number, but is 'x'"),
            ((0.9, NAN), tuple[float, float], 'there[1] must be a finite number, but is nan'),
            ({'max_norm': -1}, Clip | None, 'there.max_norm must be a number above 0, but is -1'),
            ({'max_nrom': 1}, Clip, "there.max_nrom is unknown: it takes max_norm, foreach; did you mean 'max_norm'?"),
            ([{'name': 'a', 'rows': 1}, {'name': 'b'}], list[Shard], 'there[1] has no rows'),
            ({'a': {'b': [0, INF]}}, dict[str, Any] | None, 'there.a.b.1 must be a finite number, but is inf')]:
        with pytest.raises(ValueError, match=f'^{re.escape(message)}$'):
            check_value(value, hint, 'there')


class Base:
    def __init__(self, size: Count = 1, other: 'Annotated[float, Ge(-1), Lt(1)]' = 5) -> None:
        self.size, self.other = size, other


class Child(Base):
    def __init__(self, name: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.name = name


def test_keywords_that_a_class_hands_on_are_its_bases():
    known, takes_any = declared(Child)
    assert list(known) == ['name', 'size', 'other'] and not takes_any
    check_arguments(Child, dict(name='a', size=3, other=5), 'there')  # a default is right, whatever is declared
    for given, message in ((dict(size=0), r'there\.size must be a whole number of 1 or more, but is 0'),
                           (dict(other=1), r'there\.other must be a number in \[-1, 1\), but is 1'),
                           (dict(sise=2), r"there\.sise is unknown: Child takes .*; did you mean 'size'")):
        with pytest.raises(ValueError, match=message):
            check_arguments(Child, given, 'there')
    assert declared(nn.Linear)[1] is False and declared(nn.Module)[1] is True


def test_a_default_says_the_kind_where_there_is_no_annotation():
    def function(steps=10, by_epoch=True, name='a'):
        pass

    check_arguments(function, dict(steps=None, by_epoch=False, name=3), 'there')
    for given, message in ((dict(by_epoch='banana'), 'there.by_epoch must be True or False'),
                           (dict(steps='banana'), 'there.steps must be a number or None')):
        with pytest.raises(ValueError, match=message):
            check_arguments(function, given, 'there')


def test_a_guarded_class_checks_whenever_it_is_made_and_stays_what_it_was():
    kinds = [type('Base', (Base,), {'__init__': Base.__init__}), type('Child', (Child,), {'__init__': Child.__init__})]
    for kind in kinds:
        guard(kind, 'elsewhere')
        assert not hasattr(kind.__init__, 'checked')
        guard(kind, kind.__module__.split('.')[0])
        guard(kind, kind.__module__.split('.')[0])  # once is enough
        assert not hasattr(kind.__init__.__wrapped__, 'checked')
    assert inspect.signature(kinds[0]) == inspect.signature(Base)
    assert (kinds[0](3).size, kinds[1]('a', size=4).size) == (3, 4)
    with pytest.raises(ValueError, match=r'^Base\.size must be'):
        kinds[0](-1)
    with pytest.raises(TypeError, match='unexpected keyword'):
        kinds[0](sise=1)


def test_one_that_no_registry_makes_is_checked_too():
    class Kept:
        config_key = 'model.kept'

        @checked
        def __init__(self, size: Count) -> None:
            self.size = size

    assert Kept(2).size == 2
    with pytest.raises(ValueError, match=r'^model\.kept\.size must be a whole number of 1 or more, but is 0'):
        Kept(0)


def test_every_class_of_this_package_is_checked_and_its_annotations_are_readable():
    own = [info for info in plugins.loaded() if info.distribution.replace('_', '-') == 'cdm-plugin']
    names = [name for info in own for name in info.registered]
    assert len(names) > 60
    for name in names:
        registry, _, key = name.partition('.')
        cls = getattr(root, registry).module_dict[key]
        inits = [vars(base)['__init__'] for base in cls.__mro__
                 if base.__module__.startswith('cdm_plugin') and inspect.isfunction(vars(base).get('__init__'))]
        assert all(hasattr(init, 'checked') for init in inits), name
        for init in inits:
            hints = declared(init)[0]
            assert all(hint is not Any or p == 'device_ids' for p, (hint, _) in hints.items()), (name, hints)


def test_tensors_are_not_compared():
    check_arguments(Base, dict(size=np.int64(3)), 'there')
    with pytest.raises(ValueError, match=r'there\.size'):
        check_arguments(Base, dict(size=torch.zeros(2)), 'there')
