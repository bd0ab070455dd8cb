"""Default scopes of other libraries: one that does not import, and names of two libraries."""
import sys

import pytest
from mmengine import registry as root
from mmengine.config import Config
from mmengine.registry import DefaultScope

from cdm_plugin.config import check_parts
from cdm_plugin.scopes import clashes

KINDS = ('MODELS', 'TRANSFORMS', 'METRICS')
REGISTRY = 'from mmengine import registry as root\n' + ''.join(
    f"{kind} = root.Registry({kind.lower()!r}, parent=root.{kind}, scope='acme_scope', locations=['acme_scope.{name}'])"
    '\n' for kind, name in zip(KINDS, ('models', 'transforms', 'metrics')))
TRANSFORMS = '''
from acme_scope.registry import TRANSFORMS
from cdm_plugin.data import ResizeCrop as Ours

@TRANSFORMS.register_module()
class PackInputs:
    def __init__(self, input_key='img'):
        pass

@TRANSFORMS.register_module()
class ResizeCrop(Ours):
    pass
'''


@pytest.fixture
def scope(tmp_path, monkeypatch):
    """The library `acme_scope`: its models do not import, its transforms have names of this package."""
    folder = tmp_path / 'acme_scope'
    folder.mkdir()
    for name, text in dict(__init__='', registry=REGISTRY, transforms=TRANSFORMS, models='import no_such_module',
                           metrics='').items():
        (folder / f'{name}.py').write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield 'acme_scope'
    for kind in KINDS:
        getattr(root, kind).children.pop('acme_scope', None)
    for name in [name for name in sys.modules if name.partition('.')[0] == 'acme_scope']:
        del sys.modules[name]


def pipeline(*parts, **kwargs):
    return Config(dict(kwargs, train_dataloader=dict(dataset=dict(type='LabelDataset', num_classes=2,
                                                                  pipeline=list(parts)))))


def test_a_scope_whose_modules_do_not_import_is_refused(scope):
    message = (r"default_scope='acme_scope' cannot be used here: to find 'CDM', MMEngine imports acme_scope\.models, "
               r"which fails \(ModuleNotFoundError: No module named 'no_such_module'\)\. Leave default_scope out, .*"
               r"type='acme_scope\.X'")
    with pytest.raises(ValueError, match=message):
        check_parts(Config(dict(default_scope=scope, model=dict(type='CDM'))))
    # MMEngine imports only what it looks a name up in, and its own names have no need of the library.
    check_parts(pipeline(dict(type='ResizeCrop', sizes=[8]), default_scope=scope))


def test_a_name_of_two_libraries_is_named_where_the_other_does_not_take_what_is_given(scope):
    whose = (r"type='PackInputs' is acme_scope\.transforms\.PackInputs under default_scope='acme_scope'; "
             r"cdm_plugin's is type='mmengine\.PackInputs'")
    with pytest.raises(ValueError, match=rf'^train_dataloader\.dataset\.pipeline\[0\]\.prompt is unknown: {whose}$'):
        check_parts(pipeline(dict(type='PackInputs', prompt='caption'), default_scope=scope))
    for part in (dict(type='PackInputs', input_key='x'), dict(type='mmengine.PackInputs', prompt='caption')):
        check_parts(pipeline(part, default_scope=scope))
    check_parts(pipeline(dict(type='PackInputs', prompt='caption')))


def test_names_of_two_libraries_are_listed(scope):
    parts = pipeline(dict(type='PackInputs'), dict(type='ResizeCrop', sizes=[8]), dict(type='mmengine.PackInputs'))
    assert list(clashes(parts.to_dict())) == []
    with DefaultScope.overwrite_default_scope(scope):
        (line,) = clashes(parts.to_dict())  # a class derived from ours is meant to be in its place
    assert line.startswith("train_dataloader.dataset.pipeline[0]: type='PackInputs' is acme_scope.transforms.Pack")
