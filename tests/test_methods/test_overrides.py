"""What a config may change of a method, and what it may not."""
import json

import pytest
import torch
from mmengine.registry import MODELS
from recipes import CDM, TEACHER
from tests_support import TINY_SD3, recording_optimizers, tiny_backbone, tiny_method

from cdm_plugin.commands.doctor.diagnosis import diagnose
from cdm_plugin.config import load_config
from cdm_plugin.export import export
from cdm_plugin.inference import load_method


def test_partial_overrides_change_single_arguments():
    method = tiny_method('CDM', losses=dict(cdm=dict(weight=0.3), dm=None), time_grid=dict(max_steps=4), alpha=2.0)
    assert set(method.losses) == {'ca', 'cdm'}
    assert (method.losses['cdm'].weight, method.losses['cdm'].alpha, method.losses['ca'].alpha) == (0.3, 2.0, 2.0)
    assert (method.time_grid.max_steps, method.time_grid.low) == (4, 0.25)


@pytest.mark.parametrize('type', ['DMD2', 'DecoupledDMD'])
def test_what_only_a_sibling_has_is_left_aside(type):
    method = tiny_method(type, losses=dict(cdm=dict(guided=True)), time_grid=dict(max_steps=4))
    assert 'cdm' not in method.losses
    assert method.time_grid.sigmas.tolist() == [1.0, 0.75, 0.5, 0.25]


def test_arguments_of_a_siblings_term_are_left_aside_and_others_are_not():
    assert tiny_method('DMD2', losses=dict(dm=dict(huber=None, weight=0.5))).losses['dm'].weight == 0.5
    assert tiny_method('TDM', losses=dict(dm=dict(huber=None, weight=0.5))).losses['dm'].huber is None
    for wrong, words in ((dict(dm=dict(hubre=None)), 'model.losses.dm.hubre is unknown'),
                         (dict(dm=dict(type='DMLoss', huber=None)), 'model.losses.dm.huber is unknown'),
                         (dict(dm=dict(points='noised')), 'model.losses.dm.points is unknown')):
        with pytest.raises(ValueError, match=words):
            tiny_method('DMD2', losses=wrong)


SWAPS = {'FlowMatching': dict(alpha=3.0, losses=dict(ca=dict(weight=2.0)), time_grid=dict(max_steps=4), fake_steps=2,
                              anchor_aware_fake=True, teacher=dict(init='base')),
         'CDM': dict(sigma=dict(type='UniformSigma'), drop_rate=0.2, loss=dict(type='FlowMatchingLoss'))}


@pytest.mark.parametrize('type', SWAPS)
def test_a_teachers_training_and_a_distillation_are_swapped_by_one_line(type, monkeypatch):
    said = []
    monkeypatch.setattr('cdm_plugin.methods.overrides.print_log', lambda text, *args, **kwargs: said.append(text))
    method = tiny_method(type, **SWAPS[type])
    assert said == [f'model.{key} does not apply to {type}: left aside' for key in SWAPS[type]]
    assert method.state_dict().keys() == tiny_method(type).state_dict().keys()
    with pytest.raises(ValueError, match="model.alpa is unknown: no method takes it; did you mean 'alpha'"):
        tiny_method(type, alpa=3.0)


@pytest.mark.parametrize('recipe, other', [(CDM, 'FlowMatching'), (TEACHER, 'DMD2')])
def test_a_recipes_check_and_its_doctor_allow_the_swap(recipe, other):
    cfg = load_config(recipe, {'model.type': other})
    report = diagnose(cfg)
    assert report.recipe['method'] == other
    # A student and a fake score need an optimizer each.
    assert [text.split()[0] for text in report.problems] == ([] if recipe == CDM else ['optim_wrapper.fake'])


def test_a_fixed_grid_takes_the_inference_levels_by_default():
    method = tiny_method('CDM', time_grid=dict(type='FixedTimeGrid'), sample_sigmas=[1.0, 0.5])
    assert method.time_grid.sigmas.tolist() == [1.0, 0.5]


def test_every_level_of_decoupled_dmd_is_drawn_before_the_shift_and_of_its_reuse_as_it_is_used():
    """Of 4 steps with a shift of 3 the anchors are 1, .9, .75 and .5; the caps were 1, .75, .5 and .25."""
    losses = dict(gan=dict(type='GANLoss', width=8))
    ours, reuse = (tiny_method('DecoupledDMD', losses=losses, **given) for given in ({}, dict(sigma_shift='none')))
    for ours.iteration in range(1, 21, 2):
        reuse.iteration = ours.iteration
        shifted, plain = ours.sample_draws(8), reuse.sample_draws(8)
        assert torch.equal(shifted.anchor_sigma, plain.anchor_sigma)
        cap = torch.tensor([1.0, 0.75, 0.5, 0.25]).double()[shifted.anchor]
        u = plain.losses['ca']['sigma'] / plain.anchor_sigma
        for name, ours_, theirs in (('ca', shifted.losses['ca']['sigma'], cap * u),
                                    ('dm', shifted.losses['dm']['sigma'], plain.losses['dm']['sigma']),
                                    ('gan', shifted.losses['gan']['sigma'], plain.losses['gan']['sigma']),
                                    ('fake', shifted.fake_sigma[0], plain.fake_sigma[0])):
            free = (plain.losses['ca']['sigma'] > 0.02) if name == 'ca' else (theirs > 0.02) & (theirs < 0.98)
            expected = (3 * theirs / (1 + 2 * theirs)).clamp(0.02, 0.98)
            assert torch.allclose(ours_[free], expected[free], rtol=0, atol=1e-12), name
        assert (shifted.losses['ca']['sigma'] <= shifted.anchor_sigma + 1e-12).all()


def test_tdm_needs_levels_within_its_steps():
    with pytest.raises(ValueError, match=r"model.fake_sigma is UniformSigma, but TDM needs .*dict\(type='StepSigma'\)"):
        tiny_method('TDM', fake_sigma=dict(type='UniformSigma'))
    with pytest.raises(ValueError, match='model.losses.*sigma is CappedUniformSigma'):
        tiny_method('TDM', losses=dict(dm=dict(sigma=dict(type='CappedUniformSigma'))))
    with pytest.raises(ValueError, match='model.losses.gan.sigma is UniformSigma, but TDM needs'):
        tiny_method('TDM', losses=dict(gan=dict(type='GANLoss')))
    tiny_method('TDM', losses=dict(gan=dict(type='GANLoss', sigma=dict(type='StepSigma'))))


@pytest.mark.parametrize('override, match', [
    (dict(losses=dict(ca=3)), 'must be a dict'),
    (dict(losses=dict(ca=dict(sigma=dict(low=0.1)))), 'needs a type'),
    (dict(losses=dict(ca=dict(min_norm=0))), 'min_norm'),
    (dict(losses=dict(ca=None, dm=None, cdm=None)), 'every loss'), (dict(fake_steps=0), 'fake_steps'),
    (dict(max_batch_per_call=2.5), 'max_batch_per_call'),
    (dict(time_grid=dict(max_step=3)), 'max_step'), (dict(image_size=10), 'image_size'),
    (dict(image_size=64), 'image_size')])
def test_mistakes_name_the_key(override, match):
    with pytest.raises((ValueError, TypeError), match=match):
        tiny_method('CDM', **override)


@pytest.mark.parametrize('type', ['CDM', 'FlowMatching'])
def test_pure_bfloat16_weights_are_refused(type):
    with pytest.raises(ValueError, match='AmpOptimWrapper'):
        MODELS.build(dict(type=type, backbone=tiny_backbone(dtype='bfloat16')))


@pytest.mark.parametrize('type', ['CDM', 'FlowMatching'])
def test_frozen_parts_stay_in_evaluation_mode(type):
    method = tiny_method(type).train()
    method.backbone.codec.add_module('dropout', torch.nn.Dropout())
    method.train()
    assert method.student.training
    assert not any(m.training for m in method.backbone.modules())
    assert not hasattr(method, 'teacher') or not method.teacher.training


def test_a_network_from_a_config_file_gets_the_defaults_that_the_file_leaves_out(tmp_path):
    path = tmp_path / 'config.json'
    path.write_text(json.dumps({k: v for k, v in TINY_SD3.items() if k != 'patch_size'}))  # 2 is diffusers' default
    backbone = MODELS.build({**tiny_backbone(), 'config': str(path)})
    assert backbone.config['patch_size'] == 2


def test_an_exported_student_keeps_the_image_size_that_it_was_trained_for(tmp_path):
    method = tiny_method('CDM', dtype=torch.float32, image_size=(4, 8))
    exported = load_method(str(export(method, tmp_path)), device='cpu')
    assert exported.latent_sizes[0] == method.latent_sizes[0] == (2, 4)


def test_the_loss_of_the_fake_step_comes_from_the_config(labels):
    methods = [tiny_method('CDM', fake_loss=dict(type='FlowMatchingLoss', weight=w)) for w in (1.0, 0.5)]
    whole, half = (m.train_step(labels, recording_optimizers(m))['loss_fake'] for m in methods)
    assert torch.isclose(half, whole / 2, rtol=1e-12)
