"""Flux: embedded guidance, positions, the length of its text."""
import json
from pathlib import Path

import pytest
import torch
from tiny_pipelines import PROMPTS

from cdm_plugin.backbones.flux import position_ids
from cdm_plugin.export import export
from cdm_plugin.inference import load_method

SIGMAS = [1.0, 0.75, 0.5, 0.25]


@pytest.mark.parametrize('embedded', [None, 1.0, 2.5])
@pytest.mark.parametrize('scale', [1.0, 3.0])
def test_images_with_embedded_guidance_equal_the_pipelines(scale, embedded, flux_dev):
    noise = flux_dev.noise(4, 6)
    method = flux_dev.method(backbone={} if embedded is None else dict(embedded_guidance=embedded),
                             image_size=(8, 12))
    made = method.sample(method.backbone.condition(dict(prompt=PROMPTS)), noise, guidance_scale=scale)
    kwargs = {} if embedded is None else dict(guidance_scale=embedded)
    theirs = flux_dev.images(noise, scale, sigmas=SIGMAS, **kwargs)
    assert (made - theirs).abs().max() < 1e-5
    other = flux_dev.images(noise, scale, sigmas=SIGMAS, guidance_scale=5.0)
    assert (made - other).abs().max() > 1e-3


def test_guidance_is_not_told_to_a_network_that_was_not_distilled_with_it(flux):
    noise = flux.noise()
    images = []
    for embedded in (1.0, 5.0):
        method = flux.method(backbone=dict(embedded_guidance=embedded))
        images.append(method.sample(method.backbone.condition(dict(prompt=PROMPTS)), noise))
    assert torch.equal(*images)


def test_the_usual_classifier_free_guidance_is_none(flux):
    """The pipeline's own guidance_scale is the embedded guidance."""
    backbone = flux.method().backbone
    assert backbone.pipeline_defaults() == dict(guidance_scale=1.0, num_inference_steps=28)
    assert backbone.embedded_guidance == 3.5


def test_an_exported_model_keeps_its_embedded_guidance(flux_dev, tmp_path):
    method = flux_dev.method(backbone=dict(embedded_guidance=1.5)).eval()
    folder = str(export(method, tmp_path / 'out'))
    exported = load_method(folder, device='cpu')
    assert exported.backbone.embedded_guidance == 1.5
    condition, noise = method.backbone.condition(dict(prompt=PROMPTS)), flux_dev.noise()
    assert torch.equal(*(m.sample(condition, noise, method.sample_sigmas) for m in (exported, method)))
    again = flux_dev.method(backbone=dict(pretrained=folder, embedded_guidance=2.0))  # what is asked for comes first
    assert again.backbone.embedded_guidance == 2.0
    assert json.loads(Path(folder, 'cdm_parts.json').read_text())['image_size'] == [16, 16]


@pytest.mark.parametrize('size', [(2, 5), (5, 2), (1, 1)], ids=str)
def test_positions_are_the_pipelines(size, flux):
    text, image = position_ids(512, *size, torch.device('cpu'))
    with torch.no_grad():
        expected = flux.pipeline.encode_prompt(PROMPTS)[2]
    assert torch.equal(text, expected)
    assert torch.equal(image, flux.pipeline._prepare_latent_image_ids(1, *size, 'cpu', torch.float32))


def test_positions_are_made_once_for_every_size_and_length(flux):
    position_ids.cache_clear()
    method = flux.method()
    condition = method.backbone.condition(dict(prompt=PROMPTS))
    for size in ((8, 8), (8, 8), (4, 16), (16, 4), (8, 8)):
        method.velocity('student', flux.noise(*size), torch.rand(2), condition)
    assert (position_ids.cache_info().misses, position_ids.cache_info().hits) == (3, 2)


@pytest.mark.parametrize('length', [16, 256])
def test_t5_takes_as_many_tokens_as_asked(length, flux):
    method = flux.method(backbone=dict(conditioner=dict(max_sequence_length=length)))
    with torch.no_grad():
        tokens, pooled, _ = flux.pipeline.encode_prompt(PROMPTS, max_sequence_length=length)
    condition = method.backbone.condition(dict(prompt=PROMPTS))
    assert tokens.shape == (2, length, 16)
    assert torch.allclose(condition.fields['encoder_hidden_states'], tokens, rtol=0, atol=1e-5)
    assert torch.allclose(condition.fields['pooled_projections'], pooled, rtol=0, atol=1e-5)
    assert method.backbone.conditioner.to_config()['max_sequence_length'] == length
    noise = flux.noise()
    made = method.sample(condition, noise)
    assert (made - flux.images(noise, sigmas=SIGMAS, max_sequence_length=length)).abs().max() < 1e-5
