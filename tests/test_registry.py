"""Whatever way a type is written, it is the class that MMEngine builds from it."""
import sys
import time

import mmengine.runner  # noqa: F401  registers MMEngine's own classes
import pytest
import torch
from mmengine.hooks import IterTimerHook
from mmengine.registry import HOOKS, MODELS, OPTIMIZERS, TASK_UTILS, DefaultScope

import cdm_plugin
import cdm_plugin.hooks
from cdm_plugin.plugins import PluginInfo
from cdm_plugin.registry import checked_types, class_of, is_type, registered
from cdm_plugin.sigma_samplers import SigmaSampler, UniformSigma

LIBRARY = '''
from mmengine.registry import TASK_UTILS as PARENT, Registry
TASK_UTILS = Registry('task util', parent=PARENT, scope='acme_scope', locations=['acme_scope.parts'])
'''
PARTS = '''
from acme_scope.registry import TASK_UTILS
@TASK_UTILS.register_module()
class AcmeGrid:
    pass
@TASK_UTILS.register_module()
class UniformSigma:
    """A name that another library has too."""
'''


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A library with a scope of its own, whose parts are imported when they are first asked for."""
    folder = tmp_path / 'acme_scope'
    folder.mkdir()
    for name, text in dict(__init__='', registry=LIBRARY, parts=PARTS, broken='raise AssertionError').items():
        (folder / f'{name}.py').write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    TASK_UTILS.children.pop('acme_scope', None)
    for name in [name for name in sys.modules if name.split('.')[0] == 'acme_scope']:
        del sys.modules[name]


@pytest.mark.parametrize('kind', ['UniformSigma', 'mmengine.UniformSigma', 'cdm_plugin.sigma_samplers.UniformSigma',
                                  UniformSigma])
def test_names_paths_and_classes_are_one_class(kind):
    for registry in (None, TASK_UTILS):
        assert class_of(dict(type=kind), registry) is class_of(kind, registry) is UniformSigma
        assert is_type(kind, SigmaSampler, registry) and not is_type(kind, torch.nn.Module, registry)
    assert type(TASK_UTILS.build(dict(type=kind))) is UniformSigma


@pytest.mark.parametrize('kind, registry, expected', [
    ('SGD', OPTIMIZERS, torch.optim.SGD), ('mmengine.SGD', OPTIMIZERS, torch.optim.SGD),
    ('torch.optim.sgd.SGD', OPTIMIZERS, torch.optim.SGD), ('mmengine.IterTimerHook', HOOKS, IterTimerHook),
    ('mmengine.hooks.IterTimerHook', HOOKS, IterTimerHook), (torch.nn.Identity, MODELS, torch.nn.Identity)])
def test_what_mmengine_has_is_found(kind, registry, expected):
    assert class_of(dict(type=kind), registry) is class_of(kind) is expected


@pytest.mark.parametrize('kind', ['CMD', 'mmengine.CMD', 'cdm_plugin.methods.CMD', 'no_such_package.CDM', 'torch.optim',
                                  '.CDM', 'CDM.', '', 3, None])
def test_what_is_nowhere_is_none(kind):
    assert class_of(dict(type=kind)) is class_of(kind, MODELS) is None
    assert not is_type(dict(type=kind), object)
    assert class_of({}) is None


def test_a_name_without_a_dot_imports_nothing(tmp_path, monkeypatch):
    (tmp_path / 'a_config_here.py').write_text('raise AssertionError')
    monkeypatch.syspath_prepend(tmp_path)
    assert class_of('a_config_here') is None and 'a_config_here' not in sys.modules


def test_a_function_is_no_class_of_anything():
    assert class_of(torch.nn.functional.gelu) is torch.nn.functional.gelu
    assert not is_type(torch.nn.functional.gelu, object)


@pytest.mark.parametrize('cfg', [dict(type='acme_scope.AcmeGrid'), dict(type='AcmeGrid', _scope_='acme_scope'),
                                 dict(type='acme_scope.parts.AcmeGrid'), dict(type='acme_scope.UniformSigma')])
def test_another_librarys_scope(cfg, library):
    found = class_of(cfg)
    assert found is type(TASK_UTILS.build(dict(cfg))) and found.__module__ == 'acme_scope.parts'


def test_under_another_librarys_default_scope(library):
    assert class_of('AcmeGrid') is None and class_of('UniformSigma') is UniformSigma
    with DefaultScope.overwrite_default_scope('acme_scope'):
        for name in ('AcmeGrid', 'UniformSigma'):
            assert class_of(name) is type(TASK_UTILS.build(dict(type=name)))
            assert class_of(name).__module__ == 'acme_scope.parts'
        assert class_of('FixedTimeGrid', TASK_UTILS).__module__ == 'cdm_plugin.time_grids'  # own parts, everywhere
        assert class_of('mmengine.UniformSigma', TASK_UTILS) is UniformSigma
        assert class_of('CDM', MODELS).__module__ == 'cdm_plugin.methods.cdm'  # no models of that library
    assert class_of('AcmeGrid') is None


def test_a_library_that_cannot_be_imported_is_left_to_mmengine(library, capfd):
    assert class_of('acme_scope.broken.AcmeGrid') is None
    with DefaultScope.overwrite_default_scope(f'no_such_scope_{time.time_ns()}'):
        assert class_of('UniformSigma') is UniformSigma
    assert capfd.readouterr() == ('', '')


@pytest.mark.parametrize('kind', ['UniformSigma', 'mmengine.UniformSigma', 'cdm_plugin.sigma_samplers.UniformSigma'])
def test_what_a_file_names_is_found_if_it_is_registered(kind):
    assert registered(kind, TASK_UTILS) is UniformSigma


@pytest.mark.parametrize('kind', [
    'UniformSigm', 'os.system', 'os.UniformSigma', 'torch.nn.Identity', 'builtins.eval', '', None, UniformSigma,
    'cdm_plugin.time_grids.UniformSigma', 'a_module_here.UniformSigma'])
def test_what_a_file_names_is_never_imported(kind, tmp_path, monkeypatch):
    (tmp_path / 'a_module_here.py').write_text('class UniformSigma: pass')
    monkeypatch.syspath_prepend(tmp_path)
    assert registered(kind, TASK_UTILS) is None and 'a_module_here' not in sys.modules


@pytest.fixture
def others():
    """Classes of somebody else: one like ours, one derived from ours."""
    TASK_UTILS.register_module('OthersGrid', module=type('OthersGrid', (), {}))
    TASK_UTILS.register_module('OthersSigma', module=type('OthersSigma', (UniformSigma,), {}))
    yield
    for name in ('OthersGrid', 'OthersSigma'):
        del TASK_UTILS.module_dict[name]


def test_a_file_may_name_what_a_plug_in_has_registered_or_what_is_derived_from_ours(others, monkeypatch):
    assert registered('OthersSigma', TASK_UTILS) is not None is registered('OthersGrid', TASK_UTILS)
    with pytest.raises(ValueError, match=r"a.pth: m.grid.type='OthersGrid' is refused: .*OthersSigma.*UniformSigma"):
        checked_types(dict(grid=dict(type='OthersGrid')), 'a.pth', 'm')
    info = PluginInfo('x:y', 'x', '1', 'y', 'x', '', registered=('TASK_UTILS.OthersGrid',))
    monkeypatch.setattr('cdm_plugin.plugins.loaded', lambda: [info])
    assert registered('OthersGrid', TASK_UTILS) is not None


def test_types_of_a_file_become_the_names_that_they_are_registered_by():
    data = dict(a=[dict(type='cdm_plugin.sigma_samplers.UniformSigma')], b=(dict(type='mmengine.UniformSigma'), 1.5))
    assert checked_types(data, 'a.pth', 'm') == dict(a=[dict(type='UniformSigma')], b=(dict(type='UniformSigma'), 1.5))


def test_a_class_of_the_hooks():
    assert cdm_plugin.__version__ and class_of('CDMHook', HOOKS) is cdm_plugin.hooks.CDMHook
