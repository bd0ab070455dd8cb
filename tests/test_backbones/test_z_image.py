"""Z-Image: time that runs to the image, guidance that counts from 0 and may be capped or cut, the chat template."""
import pytest
import torch
from tiny_pipelines import PROMPTS

from cdm_plugin.losses.base import LossInputs
from cdm_plugin.losses.direction import CALoss
from cdm_plugin.rollout import Prediction

SIGMAS = [1.0, 0.75, 0.5, 0.25]


def test_the_network_hears_1_minus_sigma_and_says_minus_the_velocity(z_image):
    method, sigma = z_image.method(), torch.tensor([0.9, 0.25])
    condition = method.backbone.condition(dict(prompt=PROMPTS))
    with torch.no_grad():
        texts, _ = z_image.pipeline.encode_prompt(list(PROMPTS), do_classifier_free_guidance=False)
        expected = z_image.pipeline.transformer(
            list(z_image.noise()[:, :, None]), 1 - sigma, texts, return_dict=False)[0]
    assert len({len(text) for text in texts}) == 2 and condition.masked == ['encoder_hidden_states']
    velocity = method.velocity('student', z_image.noise(), sigma, condition)
    assert torch.allclose(velocity, -torch.stack(expected)[:, :, 0], rtol=0, atol=1e-4)


def test_the_usual_settings(z_image):
    """The pipeline's guidance of 5 is the usual scale of 6; a call without guidance has 0."""
    backbone = z_image.method().backbone
    assert backbone.pipeline_defaults() == dict(guidance_scale=6.0, num_inference_steps=50)
    assert backbone.pipeline_guidance(6.0) == dict(guidance_scale=5.0)
    assert backbone.pipeline_guidance(1.0) == dict(guidance_scale=0.0)
    assert backbone.default_latent_size() == (128, 128) and backbone.tokens((128, 128)) == 4096
    assert backbone.shift((128, 128)) == 6


# Guidance


@pytest.mark.parametrize('options', [
    dict(cfg_normalization=True), dict(cfg_normalization=0.8), dict(cfg_truncation=0.4),
    dict(cfg_normalization=0.9, cfg_truncation=0.6)], ids=str)
@pytest.mark.parametrize('size', [(8, 8), (6, 4)], ids=['square', 'high'])
def test_guided_images_equal_the_pipelines(size, options, z_image):
    """After the shift by 6 the last levels are 0.86 and 0.67: the truncations are between 1, 0.95, 0.86, 0.67."""
    noise = z_image.noise(*size)
    truncation = {} if 'cfg_truncation' not in options else dict(cfg_truncation=options['cfg_truncation'] / 3)
    options = {**options, **truncation}
    method = z_image.method(backbone=options, image_size=[2 * side for side in size])
    made = method.sample(method.backbone.condition(dict(prompt=PROMPTS)), noise, guidance_scale=5.0)
    assert (made - z_image.images(noise, 5.0, sigmas=SIGMAS, **options)).abs().max() < 1e-5
    # Every one of the settings matters.
    for name in options:
        other = {key: value for key, value in options.items() if key != name}
        assert (made - z_image.images(noise, 5.0, sigmas=SIGMAS, **other)).abs().max() > 1e-3


def test_a_cap_holds_for_whole_images(z_image):
    generator = torch.Generator().manual_seed(0)
    conditional, unconditional = torch.randn(2, 3, 4, 4, 6, generator=generator, dtype=torch.float64)
    unconditional[1] = conditional[1] * 1.5  # guidance shortens this one
    guided = z_image.method(backbone=dict(cfg_normalization=0.9)).backbone.guide(conditional, unconditional, 1.5)
    for i in range(3):
        plain = unconditional[i] + 1.5 * (conditional[i] - unconditional[i])
        factor = min(1, 0.9 * float(conditional[i].norm() / plain.norm()))
        assert (factor == 1) == (i == 1)
        assert torch.allclose(guided[i], factor * plain, rtol=0, atol=1e-12)


@pytest.mark.parametrize('truncation, guided', [(1.0, [1, 1, 1]), (0.5, [1, 1, 0]), (0.2, [1, 0, 0])])
def test_training_with_the_backbones_guidance_has_none_where_it_is_cut(truncation, guided, z_image):
    backbone = z_image.method(backbone=dict(cfg_truncation=truncation)).backbone
    sigma = torch.tensor([0.9, 0.6, 0.3])
    x, cond, null = torch.randn(3, 3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    answers = {name: Prediction(x, sigma, v, x - sigma[:, None, None, None] * v)
               for name, v in (('teacher', cond), ('null', null))}
    inputs = LossInputs(answers['teacher'], {}, {}, None, backbone, None, answers=answers,
                        answering=dict(teacher=backbone))
    plain = CALoss(alpha=3.0).guided_difference(inputs)
    assert torch.allclose(plain, -3 * sigma[:, None, None, None] * (cond - null), atol=1e-5)
    found = CALoss(alpha=3.0, guidance='backbone').guided_difference(inputs)
    assert torch.allclose(found, plain * torch.tensor(guided)[:, None, None, None], rtol=0, atol=1e-5)


def test_a_negative_cap_is_refused(z_image):
    with pytest.raises(ValueError, match=r'model\.backbone\.cfg_normalization must be .* of 0 or more, but is -1'):
        z_image.method(backbone=dict(cfg_normalization=-1))


# Prompts


@pytest.mark.parametrize('length', [40, 512])
@pytest.mark.parametrize('prompt', ['', 'a fox', 'fox' * 30, 'fox ' * 600, '猫 🦊'], ids=lambda x: str(x)[:8])
def test_tokens_are_counted_as_the_pipeline_takes_them(prompt, length, z_image):
    conditioner = z_image.method(backbone=dict(conditioner=dict(max_sequence_length=length))).backbone.conditioner
    (count,) = conditioner.count_tokens([prompt])
    with torch.no_grad():
        (states,), _ = z_image.pipeline.encode_prompt(prompt, do_classifier_free_guidance=False,
                                                      max_sequence_length=length)
    assert count.limit == length and min(count.lengths[0], length) == len(states)
    found = conditioner.encode([prompt]).fields['encoder_hidden_states']
    assert torch.allclose(found, states[None], rtol=0, atol=1e-5)
    assert conditioner.truncated['Qwen3'] == (count.lengths[0] > length)
    assert conditioner.to_config()['max_sequence_length'] == length


def test_prompts_stay_as_they_are(z_image):
    """The pipeline's own encode_prompt writes the template into the list that it is given."""
    prompts = list(PROMPTS)
    z_image.method().backbone.conditioner.encode(prompts)
    assert prompts == PROMPTS
