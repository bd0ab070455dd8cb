"""guidance='backbone': the direction that the guidance of the architecture's own pipeline makes."""
import pytest
import torch
from mmengine.registry import MODELS
from tests_support import recording_optimizers, tiny_method
from tiny_pipelines import save_tiny_longcat

from cdm_plugin.losses import CALoss, DMLoss


def answers_of(method, name, data):
    """The loss `name`'s inputs in one student step."""
    kept = {}
    loss = method.losses[name]
    forward = loss.forward
    loss.forward = lambda inputs: (kept.update(inputs=inputs), forward(inputs))[1]
    logs = method.train_step(data, recording_optimizers(method))
    return loss, kept['inputs'], logs


@pytest.mark.parametrize('type', ['CDM', 'DMD2'])
def test_for_sd3_it_is_the_published_formula(type):
    data = dict(prompt=torch.tensor([0, 1, 2]))
    methods = [tiny_method(type=type, student_every=1, alpha=3.0, guidance=g) for g in ('plain', 'backbone')]
    logs = [method.train_step(data, recording_optimizers(method)) for method in methods]
    for name in logs[0]:
        assert float(logs[0][name]) == pytest.approx(float(logs[1][name]), rel=1e-9), name


@pytest.mark.parametrize('renormalised', [True, False])
@pytest.mark.parametrize('name, type', [('ca', 'DecoupledDMD'), ('dm', 'DMD2')])
def test_longcats_renormalised_guidance(name, type, renormalised, tmp_path):
    """Of LongCatImagePipeline's loop, written out: the guided velocity is shortened, token by token (2x2 latents), to
    the length of the conditional one."""
    save_tiny_longcat(tmp_path)
    torch.manual_seed(0)
    method = MODELS.build(dict(
        type=type, image_size=64, student_every=1, alpha=3.0, guidance='backbone',
        backbone=dict(type='LongCatImageBackbone', pretrained=str(tmp_path), cfg_renorm=renormalised)))
    method.seed, method.iteration = 0, 0
    loss, inputs, _ = answers_of(method, name, dict(prompt=['a fox', 'birds']))
    cond, null = inputs.answers['teacher'], inputs.answers['null']
    guided = null.velocity + 4.0 * (cond.velocity - null.velocity)
    if renormalised:
        def token_norm(v):
            return v.reshape(2, 16, 4, 2, 4, 2).square().sum((1, 3, 5)).sqrt()
        factor = (token_norm(cond.velocity) / (token_norm(guided) + 1e-8)).clamp(max=1.0)
        guided = guided * factor[:, None, :, None, :, None].expand(2, 16, 4, 2, 4, 2).reshape(2, 16, 8, 8)
    sigma = inputs.draws['sigma'][:, None, None, None]
    difference = (cond.x - sigma * guided) - (cond.x - sigma * cond.velocity)
    delta, reference = loss.direction(inputs)
    if name == 'dm':  # the real score is guided, and its own reference
        assert torch.allclose(reference, cond.x0 + difference, atol=1e-5)
        difference = cond.x0 + difference - inputs.answers['fake'].x0
    else:
        assert reference is cond.x0
    assert torch.allclose(delta, difference, atol=1e-5) and difference.abs().max() > 1e-3
    plain = 3.0 * (cond.x0 - null.x0)
    assert torch.allclose(loss.guided_difference(inputs), plain, atol=1e-5) != renormalised


def test_other_names_are_refused_and_plain_is_the_default():
    assert CALoss().guidance == DMLoss().guidance == tiny_method().losses['cdm'].guidance == 'plain'
    with pytest.raises(ValueError, match="model.guidance must be 'plain' or 'backbone', but is 'strong'"):
        tiny_method(guidance='strong')
