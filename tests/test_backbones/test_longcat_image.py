"""LongCat-Image: packing, positions, renormalised guidance, quotations."""
import pytest
import torch
from diffusers.pipelines.longcat_image import pipeline_longcat_image
from tiny_pipelines import PROMPTS

from cdm_plugin.backbones.base import pack, unpack
from cdm_plugin.backbones.longcat_image import position_ids

CPU = torch.device('cpu')


@pytest.mark.parametrize('size', [(4, 4), (2, 6), (8, 4)], ids=str)
def test_packing_is_the_pipelines(size, longcat):
    x = torch.randn(3, 16, *size, generator=torch.Generator().manual_seed(0))
    tokens = longcat.pipeline._pack_latents(x, *x.shape)
    assert torch.equal(pack(x), tokens) and tokens.shape == (3, size[0] * size[1] // 4, 64)
    assert torch.equal(unpack(tokens, *size), x)
    assert torch.equal(unpack(tokens, *size), longcat.pipeline._unpack_latents(tokens, 8 * size[0], 8 * size[1], 8))


@pytest.mark.parametrize('size', [(2, 5), (5, 2)], ids=str)
def test_positions_are_the_pipelines(size, longcat):
    text, image = position_ids(512, *size, CPU)
    with torch.no_grad():
        expected = longcat.pipeline.encode_prompt(PROMPTS)[1]
    assert torch.equal(text, expected)
    _, expected = longcat.pipeline.prepare_latents(
        1, 16, 16 * size[0], 16 * size[1], torch.float32, 'cpu', None, torch.zeros(1, 10, 64))
    assert torch.equal(image, expected)
    assert image[0].tolist() == [1, 512, 512] and image[-1].tolist() == [1, 511 + size[0], 511 + size[1]]


def test_positions_are_made_once_for_every_size_and_length(longcat, monkeypatch):
    method = longcat.method()
    condition = method.backbone.condition(dict(prompt=PROMPTS))  # makes some too, in the pipeline
    made, original = [], pipeline_longcat_image.prepare_pos_ids
    monkeypatch.setattr(pipeline_longcat_image, 'prepare_pos_ids',
                        lambda **kwargs: made.append(kwargs['type']) or original(**kwargs))
    position_ids.cache_clear()
    for _ in range(3):
        method.velocity('student', longcat.noise(), torch.rand(2), condition)
    assert made == ['text', 'image']
    method.velocity('student', longcat.noise(4, 16), torch.rand(2), condition)  # as many tokens, another shape
    assert made == ['text', 'image'] * 2


def test_positions_follow_the_shape_of_the_image(longcat):
    """The same tokens as a wide image and as a high one."""
    method = longcat.method()
    condition, sigma = method.backbone.condition(dict(prompt=PROMPTS)), torch.tensor([0.9, 0.5])
    tokens = pack(longcat.noise())
    wide, high = (pack(method.velocity('student', unpack(tokens, *size), sigma, condition))
                  for size in ((4, 16), (16, 4)))
    assert wide.shape == high.shape and (wide - high).abs().max() > 1e-3


def test_timestep_is_sigma(longcat):
    method, sigma = longcat.method(), torch.tensor([0.9, 0.25])
    condition = method.backbone.condition(dict(prompt=PROMPTS))
    velocity = method.velocity('student', longcat.noise(), sigma, condition)
    text, image = position_ids(512, 4, 4, CPU)
    with torch.no_grad():
        expected = longcat.pipeline.transformer(
            hidden_states=longcat.pipeline._pack_latents(longcat.noise(), 2, 16, 8, 8), timestep=sigma, txt_ids=text,
            img_ids=image, return_dict=False, **condition.fields)[0]
    assert torch.allclose(pack(velocity), expected, rtol=0, atol=1e-6)


def test_the_image_is_1024_pixels_by_default(longcat):
    backbone = longcat.method().backbone
    assert backbone.default_latent_size() == (128, 128) == (longcat.pipeline.default_sample_size,) * 2
    assert backbone.tokens((128, 128)) == 4096 and abs(backbone.shift((128, 128)) - 2.71828 ** 1.15) < 1e-4


# Guidance


@pytest.mark.parametrize('renorm', [
    dict(), dict(cfg_renorm=True, cfg_renorm_min=0.3), dict(cfg_renorm=True, cfg_renorm_min=0.8),
    dict(cfg_renorm=False)], ids=str)
@pytest.mark.parametrize('size', [(8, 8), (6, 4)], ids=['square', 'high'])
def test_guided_images_equal_the_pipelines(size, renorm, longcat):
    noise, sigmas = longcat.noise(*size), [1.0, 0.75, 0.5, 0.25]
    method = longcat.method(backbone=renorm, image_size=[8 * side for side in size])
    made = method.sample(method.backbone.condition(dict(prompt=PROMPTS)), noise, guidance_scale=4.5)
    kwargs = {{'cfg_renorm': 'enable_cfg_renorm'}.get(k, k): v for k, v in renorm.items()}
    theirs = longcat.images(noise, 4.5, sigmas=sigmas, **kwargs)
    assert (made - theirs).abs().max() < 1e-5
    # The settings matter: the pipeline's other ones give other images.
    other = dict(enable_cfg_renorm=not renorm.get('cfg_renorm', True))
    assert (made - longcat.images(noise, 4.5, sigmas=sigmas, **other)).abs().max() > 1e-3


@pytest.mark.parametrize('least', [0.0, 0.3, 1.0])
def test_no_token_gets_longer_than_the_conditional_one(least, longcat):
    generator = torch.Generator().manual_seed(0)
    conditional, unconditional = torch.randn(2, 2, 16, 4, 6, generator=generator, dtype=torch.float64)
    backbone = longcat.method(backbone=dict(cfg_renorm_min=least)).backbone
    plain = unconditional + 5 * (conditional - unconditional)
    guided = backbone.guide(conditional, unconditional, 5.0)
    for b in range(2):
        for i in range(2):
            for j in range(3):  # a token is a block of 2x2 latents, all channels
                block = (b, slice(None), slice(2 * i, 2 * i + 2), slice(2 * j, 2 * j + 2))
                ratio = (conditional[block].norm() / plain[block].norm()).clamp(least, 1)
                assert ratio < 0.9 or least == 1
                assert torch.allclose(guided[block], ratio * plain[block], rtol=0, atol=1e-6)


@pytest.mark.parametrize('value', [-0.1, 1.5])
def test_the_least_factor_is_checked(value, longcat):
    with pytest.raises(ValueError, match=r'model\.backbone\.cfg_renorm_min must be a number in \[0, 1\], but is'):
        longcat.method(backbone=dict(cfg_renorm_min=value))


# Prompts


@pytest.mark.parametrize('prompt, tokens', [
    ('a fox', 3), ('a "fox"', 7), ("a 'fox'", 7), ('a “fox”', 11), ("fox's fox", 5), ('a "fox', 4), ('', 0),
    ('fox' * 512, 512), ('fox' * 513, 513), ('fox' * 511 + '"fox"', 516)], ids=lambda x: str(x)[-8:])
def test_tokens_are_counted_as_the_pipeline_takes_them(prompt, tokens, longcat, monkeypatch):
    """A quotation's characters are tokens each; an apostrophe within a word is no quotation."""
    conditioner = longcat.method().backbone.conditioner
    taken, pad = [], conditioner.pipeline.tokenizer.pad
    monkeypatch.setattr(conditioner.pipeline.tokenizer, 'pad',
                        lambda batch, **kwargs: taken.extend(batch['input_ids']) or pad(batch, **kwargs))
    (count,) = conditioner.count_tokens([prompt])
    assert (count.lengths, count.limit) == ([tokens], 512)
    assert conditioner.encode([prompt]).fields['encoder_hidden_states'].shape == (1, 512, 16)
    assert len(taken[0]) == min(tokens, 512)
    assert conditioner.truncated['Qwen2.5-VL'] == (tokens > 512)


def test_no_processor_is_loaded_and_no_prompt_rewritten(longcat):
    pipeline = longcat.method().backbone.conditioner.pipeline
    assert pipeline.text_processor is None and pipeline.tokenizer_max_length == 512
