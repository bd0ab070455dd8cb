"""FLUX.2-klein: a shift by the number of steps, positions, latents of its autoencoder, layers for adapters."""
import math

import pytest
import torch
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from tests_support import recording_optimizers
from tiny_pipelines import PROMPTS

from cdm_plugin.backbones.flux2_klein import position_ids
from cdm_plugin.draws import FlowMatchingDraws
from cdm_plugin.flow import shift_sigmas


def test_the_network_hears_sigma_and_gets_the_pipelines_tokens(klein):
    method, sigma = klein.method(), torch.tensor([0.9, 0.25])
    condition = method.backbone.condition(dict(prompt=PROMPTS))
    with torch.no_grad():
        states, txt_ids = klein.pipeline.encode_prompt(PROMPTS)
        expected = klein.pipeline.transformer(
            hidden_states=klein.pipeline._pack_latents(klein.noise(4, 6)), timestep=sigma, encoder_hidden_states=states,
            txt_ids=txt_ids, img_ids=klein.pipeline._prepare_latent_ids(klein.noise(4, 6)), return_dict=False)[0]
    velocity = method.velocity('student', klein.noise(4, 6), sigma, condition)
    assert torch.allclose(klein.pipeline._pack_latents(velocity), expected, rtol=0, atol=1e-5)


def test_the_usual_settings(klein):
    backbone = klein.method().backbone
    assert backbone.pipeline_defaults() == dict(guidance_scale=4.0, num_inference_steps=50)
    assert backbone.pipeline_guidance(1.0) == dict(guidance_scale=1.0)
    assert backbone.default_latent_size() == (64, 64) and backbone.tokens((64, 64)) == 4096
    assert backbone.codec.scale == 4 and backbone.latent_channels == 16


@pytest.mark.parametrize('size', [(2, 5), (5, 2), (1, 1)], ids=str)
def test_positions_are_the_pipelines_and_made_once_a_size(size, klein):
    position_ids.cache_clear()
    for _ in range(2):
        text, image = position_ids(7, *size, torch.device('cpu'))
    assert torch.equal(text, klein.pipeline._prepare_text_ids(torch.zeros(1, 7, 1))[0])
    assert torch.equal(image, klein.pipeline._prepare_latent_ids(torch.zeros(1, 1, *size))[0])
    assert position_ids.cache_info().misses == 1


# The shift


@pytest.mark.parametrize('steps', [1, 2, 4, 9])
def test_images_of_any_number_of_steps_equal_the_pipelines(steps, klein):
    """Each number has a shift of its own."""
    noise = klein.noise(4, 6)
    method = klein.method(image_size=(16, 24), sample_sigmas=torch.linspace(1, 1 / steps, steps).tolist())
    made = method.sample(method.backbone.condition(dict(prompt=PROMPTS)), noise)
    assert (made - klein.images(noise, num_inference_steps=steps)).abs().max() < 1e-5


@pytest.mark.parametrize('size', [(4, 4), (64, 64), (80, 80)])
def test_single_levels_have_the_shift_of_50_steps_and_lists_their_own(size, klein):
    backbone = klein.method().backbone
    sigmas = torch.tensor([1.0, 0.6, 0.3], dtype=torch.float64)
    single, grid = (math.exp(compute_empirical_mu(size[0] * size[1], steps)) for steps in (50, 3))
    assert (single == grid) == (size == (80, 80))  # large images have one shift for all
    assert backbone.shift(size) == single
    assert torch.allclose(backbone.shift_sigmas(sigmas, size), shift_sigmas(sigmas, single), atol=1e-12)
    assert torch.allclose(backbone.shift_grid(sigmas, size), shift_sigmas(sigmas, grid), atol=1e-12)


def test_a_constant_shift_is_taken(klein):
    backbone = klein.method(backbone=dict(scheduler=dict(shift=2.0))).backbone
    sigmas = torch.tensor([1.0, 0.6, 0.3])
    for shifted in (backbone.shift_grid(sigmas, (4, 4)), backbone.shift_sigmas(sigmas, (4, 4))):
        assert torch.allclose(shifted, shift_sigmas(sigmas, 2.0))


def test_levels_of_flow_matching_do_not_depend_on_the_batch(klein):
    method = klein.method().train()
    method.seed, method.iteration = 0, 0
    seen, velocity = [], method.velocity
    method.velocity = lambda role, x, sigma, *args: seen.append(sigma) or velocity(role, x, sigma, *args)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    method.train_step(dict(prompt=PROMPTS, image=images), recording_optimizers(method))
    raw = FlowMatchingDraws.sample(seed=0, rank=0, iteration=0, shape=(2, 16, 8, 8), sigma=method.sigma, drop_rate=0.1,
                                   shift=lambda sigmas: sigmas).sigma
    assert torch.allclose(seen[0].double(), shift_sigmas(raw, math.exp(compute_empirical_mu(64, 50))), atol=1e-6)


# Prompts


@pytest.mark.parametrize('length', [40, 512])
@pytest.mark.parametrize('prompt', ['', 'a fox', 'fox' * 30, 'fox ' * 600, '猫 🦊'], ids=lambda x: str(x)[:8])
def test_texts_have_one_length_and_are_counted_as_the_pipeline_takes_them(prompt, length, klein):
    conditioner = klein.method(backbone=dict(conditioner=dict(max_sequence_length=length))).backbone.conditioner
    tokenizer = klein.pipeline.tokenizer
    taken = tokenizer.apply_chat_template([dict(role='user', content=prompt)], add_generation_prompt=True,
                                          enable_thinking=False, return_dict=True)['input_ids']
    (count,) = conditioner.count_tokens([prompt])
    assert (count.limit, count.lengths) == (length, [len(taken)])
    with torch.no_grad():
        states, _ = klein.pipeline.encode_prompt(prompt, max_sequence_length=length)
    found = conditioner.encode([prompt]).fields
    assert set(found) == {'encoder_hidden_states'} and states.shape == (1, length, 24)
    assert torch.allclose(found['encoder_hidden_states'], states, rtol=0, atol=1e-5)
    assert conditioner.truncated['Qwen3'] == (len(taken) > length)
    assert conditioner.to_config()['max_sequence_length'] == length
