"""Qwen-Image: a list of levels that is stretched to its end, guidance that keeps lengths, masks, its template."""
import math

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from mmengine.registry import MODELS
from tests_support import recording_optimizers
from tiny_pipelines import PROMPTS

from cdm_plugin.backbones.base import pack
from cdm_plugin.draws import FlowMatchingDraws, stream

# Of the tiny pipeline's shift, by the number of tokens.
SLOPE = (1.5 - 0.8) / (256 - 4)


def test_the_network_hears_sigma_and_gets_the_pipelines_tokens(qwen_image):
    method, sigma = qwen_image.method(), torch.tensor([0.9, 0.25])
    condition = method.backbone.condition(dict(prompt=PROMPTS))
    pipeline = qwen_image.pipeline
    with torch.no_grad():
        states, mask = pipeline.encode_prompt(PROMPTS)
        expected = pipeline.transformer(
            hidden_states=pipeline._pack_latents(qwen_image.noise(), 2, 4, 8, 8), timestep=sigma,
            encoder_hidden_states=states, encoder_hidden_states_mask=mask, img_shapes=[[(1, 4, 4)]] * 2,
            return_dict=False)[0]
    assert not mask.all() and condition.masked == ['encoder_hidden_states']
    velocity = method.velocity('student', qwen_image.noise(), sigma, condition)
    assert torch.allclose(pack(velocity), expected, rtol=0, atol=1e-5)


def test_the_usual_settings(qwen_image):
    backbone = qwen_image.method(backbone=dict(conditioner=dict(negative_prompt=' '))).backbone
    assert backbone.pipeline_defaults() == dict(guidance_scale=4.0, num_inference_steps=50)
    assert backbone.pipeline_guidance(1.0) == dict(true_cfg_scale=1.0)
    assert backbone.pipeline_guidance(4.0) == dict(true_cfg_scale=4.0, negative_prompt=' ')
    assert backbone.default_latent_size() == (128, 128) and backbone.tokens((128, 128)) == 4096


# The levels


@pytest.mark.parametrize('steps', [2, 4, 9])
def test_images_of_any_number_of_steps_equal_the_pipelines(steps, qwen_image):
    noise = qwen_image.noise(4, 6)
    method = qwen_image.method(image_size=(8, 12), sample_sigmas=torch.linspace(1, 1 / steps, steps).tolist())
    assert abs(method.shift(method.sample_sigmas, (4, 6))[-1] - 0.02) < 1e-12
    made = method.sample(method.backbone.condition(dict(prompt=PROMPTS)), noise)
    assert (made - qwen_image.images(noise, num_inference_steps=steps)).abs().max() < 1e-5


def test_one_step_is_left_alone(qwen_image):
    """Diffusers divides by 0 there."""
    method = qwen_image.method(sample_sigmas=[1.0])
    assert method.shift(method.sample_sigmas).tolist() == [1.0]
    assert method.sample(method.backbone.condition(dict(prompt=PROMPTS)), qwen_image.noise()).isfinite().all()


def test_grids_of_training_are_what_a_pipeline_makes_of_them(qwen_image):
    """And their anchors are levels of these."""
    method = qwen_image.method('CDM', time_grid=dict(max_steps=6)).train()
    scheduler, seen = qwen_image.pipeline.scheduler, set()
    for method.iteration in range(12):
        method.seed = 0
        raw = method.time_grid.sample(stream(0, method.iteration, 'time_grid'))
        draws = method.sample_draws(2)
        if len(raw) > 1:
            scheduler.set_timesteps(sigmas=raw.tolist(), mu=0.8 + SLOPE * (16 - 4))
            assert torch.allclose(draws.sigmas, scheduler.sigmas[:-1], rtol=0, atol=1e-6)
        seen.add(len(raw))
        assert all(sigma in draws.sigmas for sigma in draws.anchor_sigma)
    assert len(seen) > 3


def test_levels_of_flow_matching_do_not_depend_on_those_beside_them(qwen_image):
    method = qwen_image.method().train()
    method.seed, method.iteration = 0, 0
    seen, velocity = [], method.velocity
    method.velocity = lambda role, x, sigma, *args: seen.append(sigma) or velocity(role, x, sigma, *args)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    method.train_step(dict(prompt=PROMPTS, image=images), recording_optimizers(method))
    raw = FlowMatchingDraws.sample(seed=0, rank=0, iteration=0, shape=(2, 4, 8, 8), sigma=method.sigma, drop_rate=0.1,
                                   shift=lambda sigmas: sigmas).sigma
    factor = math.exp(0.8 + SLOPE * (16 - 4))
    assert torch.allclose(seen[0].double(), factor * raw / (1 + (factor - 1) * raw), rtol=0, atol=1e-6)


# Guidance


def test_guidance_keeps_the_length_of_every_token(qwen_image):
    generator = torch.Generator().manual_seed(0)
    conditional, unconditional = torch.randn(2, 2, 4, 4, 6, generator=generator, dtype=torch.float64)
    guided = qwen_image.method().backbone.guide(conditional, unconditional, 4.0)
    plain = unconditional + 4 * (conditional - unconditional)
    for b in range(2):
        for i in range(2):
            for j in range(3):  # a token is a block of 2x2 latents, all channels
                block = (b, slice(None), slice(2 * i, 2 * i + 2), slice(2 * j, 2 * j + 2))
                expected = plain[block] * conditional[block].norm() / plain[block].norm()
                assert torch.allclose(guided[block], expected, rtol=0, atol=1e-12)


# Prompts


@pytest.mark.parametrize('length', [130, 512, 1024])
@pytest.mark.parametrize('prompt', ['', 'a {fox}', 'fox' * 30, 'fox ' * 600, '猫 🦊'], ids=lambda x: str(x)[:8])
def test_tokens_are_counted_as_the_pipeline_takes_them(prompt, length, qwen_image):
    conditioner = qwen_image.method(backbone=dict(conditioner=dict(max_sequence_length=length))).backbone.conditioner
    (count,) = conditioner.count_tokens([prompt])
    with torch.no_grad():
        states, mask = qwen_image.pipeline.encode_prompt(prompt, max_sequence_length=length)
    assert mask is None and count.limit == length and min(count.lengths[0], length) == states.shape[1]
    found = conditioner.encode([prompt]).fields
    assert set(found) == {'encoder_hidden_states'}
    assert torch.allclose(found['encoder_hidden_states'], states, rtol=0, atol=1e-5)
    assert conditioner.truncated['Qwen2.5-VL'] == (count.lengths[0] > length)
    assert conditioner.to_config()['max_sequence_length'] == length


def test_more_tokens_than_the_pipeline_takes_are_refused(qwen_image):
    with pytest.raises(ValueError, match=r'model\.backbone\.conditioner\.max_sequence_length must be a whole number '
                                         r'in \[1, 1024\], but is 2000'):
        qwen_image.method(backbone=dict(conditioner=dict(max_sequence_length=2000)))


# The network


def test_a_network_on_the_meta_device_has_its_positions(qwen_image):
    """They are tables that no checkpoint holds."""
    backbone = qwen_image.method().backbone
    empty = backbone.empty_network()
    assert {p.device.type for p in empty.parameters()} == {'meta'}
    shapes, device = [(1, 4, 6)], torch.device('cpu')
    expected = backbone.build_network().pos_embed(shapes, device=device, max_txt_seq_len=7)
    for found, wanted in zip(empty.pos_embed(shapes, device=device, max_txt_seq_len=7), expected):
        assert torch.equal(found, wanted)


def test_a_network_with_a_mask_beside_the_latents_is_refused():
    config = dict(in_channels=33, out_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
                  joint_attention_dim=8, axes_dims_rope=(2, 2, 4))
    assert QwenImageTransformer2DModel(**config).config.in_channels == 33
    with pytest.raises(ValueError, match='takes 33 channels and gives 16: it needs an image beside the noisy latents'):
        MODELS.build(dict(type='QwenImageBackbone', config=config, codec=dict(type='PixelCodec', scale=2),
                          conditioner=dict(type='ClassConditioner', num_classes=3)))
