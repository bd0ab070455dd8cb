import ast
import importlib
import sys
from pathlib import Path

import pytest
import torch
from mmengine.registry import MODELS

from cdm_plugin import plugins

GOOD = '''
from mmengine.registry import MODELS
from torch import nn

@MODELS.register_module()
class AcmeNet(nn.Identity):
    pass
'''
HOOKS = '''
from cdm_plugin.plugins import hookimpl

@hookimpl
def cdm_student_losses(method):
    return dict(sharpness=dict(type='SharpnessLoss', weight=0.1))

@hookimpl
def cdm_after_iteration(iteration, logs):
    return dict(doubled=2 * logs['loss'] + iteration)
'''
WRONG_ARGUMENT = '''
from cdm_plugin.plugins import hookimpl

@hookimpl
def cdm_student_losses(model):
    return dict(wrong=dict(type='WrongLoss'))
'''
UNKNOWN_HOOK = WRONG_ARGUMENT.replace('cdm_student_losses', 'cdm_student_loss')
TAKEN_NAME = GOOD.replace('AcmeNet', 'CALoss')


def info_of(name):
    plugins.load()
    found = {info.name: info for info in plugins.loaded()}
    return found[name]


def test_own_parts_come_first_and_in_the_order_of_setup_py():
    source = (Path(__file__).parents[1] / 'setup.py').read_text()
    parts = next(ast.literal_eval(node.value) for node in ast.parse(source).body
                 if isinstance(node, ast.Assign) and node.targets[0].id == 'PARTS')
    own = plugins.loaded()[:len(parts)]
    assert [info.entry_point for info in own] == parts
    assert {info.status for info in own} == {'loaded'}
    assert {plugins._normalise(info.distribution) for info in own} == {'cdm-plugin'}


def test_own_parts_state_what_they_registered():
    own = {info.entry_point: info.registered for info in plugins.loaded()}
    names = ('CA', 'DM', 'CDM', 'FlowMatching', 'GAN', 'Reward', 'Regression', 'TDM')
    assert {f'MODELS.{name}Loss' for name in names} == set(own['losses'])
    assert {'TASK_UTILS.FixedTimeGrid', 'TASK_UTILS.DynamicTimeGrid'} <= set(own['time_grids'])


def test_plugin_registers_and_is_listed(site):
    site.install('acme-nets', dict(nets='acme_nets'), version='2.5', acme_nets=GOOD)
    plugins.load()
    assert isinstance(MODELS.build(dict(type='AcmeNet')), torch.nn.Identity)
    assert plugins.loaded()[-1] == plugins.PluginInfo(
        name='acme-nets:nets', distribution='acme-nets', version='2.5', entry_point='nets', module='acme_nets',
        location=str(site.folder / 'acme_nets.py'), status='loaded', registered=('MODELS.AcmeNet', ))
    assert plugins.manager.get_plugin('acme-nets:nets') is sys.modules['acme_nets']


def test_names_of_a_module_imported_earlier_are_listed_too(site):
    site.install('acme', dict(nets='acme_nets'), acme_nets=GOOD)
    importlib.import_module('acme_nets')
    assert info_of('acme:nets').registered == ('MODELS.AcmeNet', )


def test_entry_point_may_name_an_object(site):
    source = 'from cdm_plugin.plugins import hookimpl\n\nclass Terms:\n    @hookimpl\n' \
             '    def cdm_student_losses(self):\n        return dict(a=dict(type="A"))\n\nterms = Terms()\n'
    site.install('acme', dict(terms='acme_terms:terms'), acme_terms=source)
    assert info_of('acme:terms').module == 'acme_terms'
    assert plugins.manager.hook.cdm_student_losses(method=None) == [dict(a=dict(type='A'))]


def test_load_again_loads_only_what_is_new(site):
    site.install('first', dict(net='first'), first=GOOD)
    plugins.load()
    site.install('second', dict(net='second'), second=GOOD.replace('AcmeNet', 'OtherNet'))
    plugins.load()
    names = [info.name for info in plugins.loaded()]
    assert names[-2:] == ['first:net', 'second:net'] and len(names) == len(set(names))


def test_two_copies_of_the_metadata_are_one_plugin(make_site):
    checkout, installed = make_site('checkout'), make_site('installed')
    installed.install('acme_nets', dict(nets='acme_nets'), version='2.0', acme_nets=GOOD)
    checkout.install('Acme.Nets', dict(nets='acme_nets'), version='1.9', suffix='egg-info')
    plugins.load()
    found = [info for info in plugins.loaded() if info.module == 'acme_nets']
    assert [(info.version, info.status) for info in found] == [('2.0', 'loaded')]


@pytest.mark.parametrize('source, cause', [
    ('import no_such_module', "ModuleNotFoundError: No module named 'no_such_module'"),
    ('raise SystemExit(3)', 'SystemExit: 3'),
    (TAKEN_NAME, 'KeyError: .*CALoss is already registered in model'),
    (WRONG_ARGUMENT, "PluginValidationError: .*cdm_student_losses.*'model'"),
    (UNKNOWN_HOOK, "PluginValidationError: unknown hook 'cdm_student_loss'"),
])
def test_failing_plugin_is_named_and_stops_nothing(site, source, cause):
    site.install('a-broken', dict(part='a_broken'), a_broken=source)
    site.install('b-good', dict(nets='b_good'), b_good=GOOD)
    with pytest.warns(RuntimeWarning, match=f"(?s)'part' .*'a-broken'.*{cause}") as caught:
        plugins.load()
    assert len(caught) == 1
    broken = info_of('a-broken:part')
    assert broken.status == 'failed' and broken.error and broken.registered == ()
    assert info_of('b-good:nets').status == 'loaded' and 'AcmeNet' in MODELS
    assert not plugins.manager.has_plugin('a-broken:part')
    assert plugins.manager.hook.cdm_student_losses(method=None) == []


def test_failing_plugin_is_warned_about_once(site, recwarn):
    site.install('acme', dict(part='acme_part'), acme_part='1 / 0')
    plugins.load()
    plugins.load()
    assert len([warning for warning in recwarn if 'ZeroDivisionError' in str(warning.message)]) == 1


def test_warnings_as_errors_still_load_the_others(site):
    site.install('a-broken', dict(part='a_broken'), a_broken='1 / 0')
    site.install('b-good', dict(nets='b_good'), b_good=GOOD)
    with pytest.raises(RuntimeWarning), pytest.MonkeyPatch.context() as patch:
        patch.setattr(plugins.warnings, 'warn', lambda message, kind, stacklevel: (_ for _ in ()).throw(kind(message)))
        plugins.load()
    assert info_of('b-good:nets').status == 'loaded'


def test_a_failed_plugin_lists_what_it_left_behind(site):
    site.install('acme', dict(nets='acme_nets'), acme_nets=GOOD + '\n1 / 0\n')
    with pytest.warns(RuntimeWarning, match='ZeroDivisionError'):
        plugins.load()
    assert info_of('acme:nets').registered == ('MODELS.AcmeNet', )


def test_outside_plugins_can_be_disabled(site, monkeypatch):
    site.install('acme', dict(nets='acme_nets'), acme_nets=GOOD)
    monkeypatch.setenv('CDM_DISABLE_PLUGINS', '1')
    info = info_of('acme:nets')
    assert (info.status, info.location, info.registered) == ('disabled', str(site.folder), ())
    assert 'acme_nets' not in sys.modules and 'AcmeNet' not in MODELS
    assert info_of(plugins.loaded()[0].name).status == 'loaded'

    monkeypatch.setenv('CDM_DISABLE_PLUGINS', '0')
    assert info_of('acme:nets').status == 'loaded'


def test_hooks_reach_the_plugin(site):
    site.install('acme', dict(hooks='acme_hooks'), acme_hooks=HOOKS)
    plugins.load()
    hook = plugins.manager.hook
    assert hook.cdm_student_losses(method=None) == [dict(sharpness=dict(type='SharpnessLoss', weight=0.1))]
    assert hook.cdm_after_iteration(method=None, iteration=3, logs=dict(loss=torch.tensor(2.))) == [dict(doubled=7)]


# What importing cdm_plugin does, where a plug-in is imported before it: loading meets the plug-in half-way through.
IMPORTED_FIRST = 'from cdm_plugin import plugins\nplugins.load()\nassert not plugins.manager.has_plugin("acme:hooks")\n'


def test_plugin_that_is_imported_before_the_package_keeps_its_hooks(site):
    site.install('acme', dict(hooks='acme_hooks'), acme_hooks=IMPORTED_FIRST + HOOKS + GOOD)
    importlib.import_module('acme_hooks')
    assert len(plugins.manager.hook.cdm_student_losses(method=None)) == 1
    info = {info.name: info for info in plugins.loaded()}['acme:hooks']
    assert (info.status, info.registered) == ('loaded', ('MODELS.AcmeNet', ))


def test_plugin_that_is_imported_before_the_package_is_checked_too(site):
    site.install('acme', dict(hooks='acme_hooks'), acme_hooks=IMPORTED_FIRST + WRONG_ARGUMENT)
    importlib.import_module('acme_hooks')
    with pytest.warns(RuntimeWarning, match="'acme'.*PluginValidationError"):
        assert plugins.manager.hook.cdm_student_losses(method=None) == []
    assert info_of('acme:hooks').status == 'failed'


@pytest.mark.parametrize('entries', [{}, {part: f'cdm_plugin.{part}' for part in plugins.PARTS[:-1]},
                                     {part: f'cdm_plugin.{part}' for part in (*plugins.PARTS, 'gone')}])
def test_package_that_is_not_properly_installed_says_so(site, monkeypatch, entries):
    monkeypatch.setattr(plugins, '_infos', {})
    site.install('cdm-plugin', entries)
    with pytest.raises(ImportError, match=r'pip install -e \.'):
        plugins.load()


def test_checkout_without_metadata_says_so(monkeypatch):
    monkeypatch.setattr(plugins.metadata, 'distributions', lambda: [])
    with pytest.raises(ImportError, match=r'is not installed.*`pip install -e \.`.*`pip install \.`'):
        plugins.load()


def test_own_part_that_fails_is_an_error(site, monkeypatch):
    monkeypatch.setattr(plugins, '_infos', {})
    entries = {part: f'cdm_plugin.{part}' for part in plugins.PARTS}
    site.install('cdm_plugin', {**entries, 'losses': 'broken_losses'}, broken_losses='import no_such_module')
    with pytest.raises(ImportError, match="own part 'losses'.*no_such_module") as caught:
        plugins.load()
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_table_fits_the_terminal():
    long = tuple(f'MODELS.ALossWithALongName{i}' for i in range(12))
    infos = [plugins.PluginInfo('acme-nets:nets', 'acme-nets', '2.5', 'nets', 'acme_nets', '/site/acme_nets.py',
                                'loaded', registered=long),
             plugins.PluginInfo('b:x', 'b', '1.10.0', 'x', 'b_x', '/site', 'failed', 'KeyError: ' + 'taken ' * 40)]
    lines = plugins.format_table(infos).splitlines()
    assert max(map(len, lines)) <= 100
    assert [line.split() for line in lines if not line.startswith(' ')] == [
        ['plug-in', 'version', 'status'], ['acme-nets:nets', '2.5', 'loaded'], ['b:x', '1.10.0', 'failed']]
    assert lines[0].index('status') == lines[1].index('loaded')
    text = ' '.join(lines)
    assert 'acme_nets in /site/acme_nets.py' in text and 'KeyError: taken' in text
    assert all(name in text for name in long)


def test_own_part_that_failed_is_loaded_once_it_can_be(site, monkeypatch):
    monkeypatch.setattr(plugins, '_infos', {})
    entries = {part: f'cdm_plugin.{part}' for part in plugins.PARTS}
    site.install('cdm_plugin', {**entries, 'losses': 'mended_losses'}, mended_losses='import no_such_module')
    with pytest.raises(ImportError, match="own part 'losses'"):
        plugins.load()
    (site.folder / 'mended_losses.py').write_text('mended = True')
    importlib.invalidate_caches()
    assert info_of('cdm_plugin:losses').status == 'loaded' and plugins.loaded()[-1].entry_point == 'hooks'
