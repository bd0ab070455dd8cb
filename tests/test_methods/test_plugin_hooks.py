"""Hooks of plug-ins in a training: two together, and what becomes of one that fails."""
import logging

import pytest
import torch
from mmengine.logging import MMLogger
from tests_support import recording_optimizers, tiny_method

from cdm_plugin import plugins
from cdm_plugin.config import check_part

HEAD = 'from cdm_plugin.plugins import hookimpl\n'
OBSERVER = HEAD + '''
@hookimpl
def cdm_after_iteration(iteration, logs):
    return dict({name}={value})
'''
TERMS = HEAD + '''
@hookimpl
def cdm_student_losses(method):
    return {value}
'''


def install(site, **sources):
    for name, source in sources.items():
        site.install(f'{name}-parts', dict(part=f'{name}_part'), **{f'{name}_part': source})
    plugins.load()


def train(method, iterations=1):
    """Scalars of each iteration."""
    optimizers, seen = recording_optimizers(method), []
    for method.iteration in range(iterations):
        seen.append(method.train_step(dict(prompt=torch.tensor([0, 1])), optimizers))
    return seen


@pytest.fixture
def log(caplog, monkeypatch):
    """What is logged as errors."""
    said = []
    logger = MMLogger.get_current_instance()
    monkeypatch.setattr(logger, 'handle', lambda record: said.append((record.levelno, record.getMessage())))
    return lambda: [text for level, text in said if level == logging.ERROR]


def test_two_plugins_add_their_terms_and_scalars(site):
    install(site, first=OBSERVER.format(name='twice', value="2 * logs['loss_fake']") + TERMS.format(
        value="dict(regular=dict(type='DMLoss', weight=0.5))").replace(HEAD, ''),
        second=OBSERVER.format(name='number', value='iteration'))
    method = tiny_method('DMD2', student_every=1)
    logs = train(method)[0]
    assert set(method.losses) == {'dm', 'regular'} and method.losses['regular'].weight == 0.5
    assert float(logs['twice']) == 2 * float(logs['loss_fake']) and logs['number'] == 0 and 'loss_regular' in logs
    assert not logs['twice'].requires_grad
    assert set(tiny_method('DMD2', losses=dict(regular=None)).losses) == {'dm'}  # a config has the last word


@pytest.mark.parametrize('value, cause', [
    ("logs['nothing']", 'KeyError'),
    ("logs['loss_fake'].expand(2)", 'must be a number, or a tensor of one'),
    ("logs.clear()", 'AttributeError'),
])
def test_an_observer_that_fails_is_named_once_and_the_training_goes_on(value, cause, site, log):
    install(site, bad=OBSERVER.format(name='wrong', value=value),
            good=OBSERVER.format(name='number', value='iteration'))
    plain = train(tiny_method('DMD2', student_every=1), 3)
    assert [logs['number'] for logs in plain] == [0, 1, 2] and not any('wrong' in logs for logs in plain)
    (text,) = log()
    assert text.startswith("the plug-in 'part' (bad_part) of the distribution 'bad-parts' failed in "
                           'cdm_after_iteration, in iteration 0, and is asked no more: ')
    assert cause in text and 'Update or uninstall bad-parts' in text and 'Traceback' in text


def test_a_scalar_of_a_name_that_is_taken_is_left_out(site, log):
    install(site, first=OBSERVER.format(name='loss_fake', value='0.0'), second=OBSERVER.format(name='a', value='1'),
            third=OBSERVER.format(name='a', value='2'))
    logs = train(tiny_method('DMD2', student_every=1))[0]
    assert float(logs['loss_fake']) > 0 and logs['a'] in (1, 2)
    assert len(log()) == 2 and all('has a scalar' in text for text in log())


def test_an_observer_that_ends_the_run_ends_it(site):
    install(site, bad=OBSERVER.format(name='wrong', value='exit(3)'))
    with pytest.raises(SystemExit):
        train(tiny_method('DMD2'))


@pytest.mark.parametrize('value, message', [
    ('{}[0]', r"'part' \(bad_part\) of the distribution 'bad-parts' failed in cdm_student_losses: .*KeyError"),
    ('[1]', "'bad-parts' failed in cdm_student_losses: it must return a dict, name -> config, or None, but returned"),
    ("dict(x=dict(type='NoSuchLoss'))", "'bad-parts' failed in its student loss, model.losses.x: .*NoSuchLoss"),
    ("dict(dm=dict(type='DMLoss'))", "'bad-parts' and DMD2 itself both give a student loss named 'dm'"),
])
def test_a_term_that_fails_stops_the_training_by_name(value, message, site):
    install(site, bad=TERMS.format(value=value))
    with pytest.raises(ValueError, match=message) as caught:
        tiny_method('DMD2')
    assert 'Update or uninstall bad-parts, or leave all plug-ins out with CDM_DISABLE_PLUGINS=1' in str(caught.value)


def test_two_plugins_that_give_a_term_of_one_name(site):
    term = TERMS.format(value="dict(same=dict(type='DMLoss'))")
    install(site, first=term, second=term)
    with pytest.raises(ValueError, match="(?s)'(first|second)-parts' and .*'(first|second)-parts' both give .* 'same'"):
        tiny_method('DMD2')


def test_a_wrapper_of_other_plugins_is_refused(site):
    with pytest.warns(RuntimeWarning, match="'bad-parts' failed.*may not be a wrapper.*Update or uninstall bad-parts"):
        install(site, bad=OBSERVER.format(name='x', value='(yield)').replace('@hookimpl', '@hookimpl(wrapper=True)'))


def test_a_plugin_that_is_registered_by_hand_is_asked(site):
    class Observer:
        @plugins.hookimpl
        def cdm_after_iteration(self, iteration):
            return dict(number=iteration + 10)

    plugins.manager.register(Observer(), name='mine')
    assert train(tiny_method('DMD2'))[0]['number'] == 10


def test_a_type_that_is_missing_says_which_plugins_are_left_out(site, monkeypatch):
    with pytest.warns(RuntimeWarning):
        install(site, bad='import no_such_module')
    with pytest.raises(ValueError, match=r"'AcmeThing' is not registered.* \(left out: the plug-in 'part' \(bad_part\) "
                                         "of the distribution 'bad-parts', ModuleNotFoundError: .*no_such_module"):
        check_part(dict(type='AcmeThing'), 'model')
    site.install('off-parts', dict(part='off_part'), off_part='')
    monkeypatch.setenv('CDM_DISABLE_PLUGINS', '1')
    plugins.load()
    with pytest.raises(ValueError, match="'off-parts', CDM_DISABLE_PLUGINS"):
        check_part(dict(type='AcmeThing'), 'model')


def test_a_loss_that_is_none_of_each_sample_is_named(monkeypatch):
    method = tiny_method('DMD2', student_every=1)
    monkeypatch.setattr(method.losses['dm'], 'forward', lambda inputs: (inputs.prediction.x0.mean(), {}))
    with pytest.raises(ValueError, match=r'losses.dm \(DMLoss\) must return .* sample, \(2,\), but returned \(\)'):
        train(method)
