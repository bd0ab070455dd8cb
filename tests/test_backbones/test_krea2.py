"""Krea 2: its shifts, positions, texts without the padding in the middle of their template."""
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from tiny_pipelines import PROMPTS, Tiny

from cdm_plugin.backbones import Krea2Backbone
from cdm_plugin.backbones.base import pack
from cdm_plugin.backbones.krea2 import position_ids
from cdm_plugin.export import export

SIGMAS = [1.0, 0.75, 0.5, 0.25]


def test_the_network_hears_sigma_and_padding_in_the_middle_changes_nothing(krea2):
    """The pipeline pads to 512 tokens, and masks that."""
    method, sigma, pipeline = krea2.method(), torch.tensor([0.9, 0.25]), krea2.pipeline
    condition = method.backbone.condition(dict(prompt=PROMPTS))
    with torch.no_grad():
        states, mask = pipeline.encode_prompt(PROMPTS)
        expected = pipeline.transformer(
            hidden_states=pipeline._pack_latents(krea2.noise(4, 6), 2, 4, 4, 6), timestep=sigma,
            encoder_hidden_states=states, encoder_attention_mask=mask,
            position_ids=pipeline.prepare_position_ids(states.shape[1], 2, 3, 'cpu'), return_dict=False)[0]
    assert condition.fields['encoder_hidden_states'].shape[1] < states.shape[1] / 2
    velocity = method.velocity('student', krea2.noise(4, 6), sigma, condition)
    assert torch.allclose(pack(velocity), expected, rtol=0, atol=1e-5)


def test_the_usual_settings(krea2):
    """Its pipeline counts guidance from 0."""
    backbone = krea2.method().backbone
    assert backbone.pipeline_defaults() == dict(guidance_scale=5.5, num_inference_steps=28)
    assert backbone.pipeline_guidance(1.0) == dict(guidance_scale=0.0)
    assert backbone.default_latent_size() == (128, 128) and backbone.tokens((128, 128)) == 4096
    empty, real = backbone.empty_condition(7), backbone.condition(dict(prompt=PROMPTS[:1]))
    assert empty.fields['encoder_hidden_states'].shape[2:] == real.fields['encoder_hidden_states'].shape[2:]


@pytest.mark.parametrize('size', [(2, 5), (5, 2), (1, 1)], ids=str)
def test_positions_are_the_pipelines_and_made_once_a_size(size, krea2):
    position_ids.cache_clear()
    for _ in range(2):
        found = position_ids(7, *size, torch.device('cpu'))
    assert torch.equal(found, krea2.pipeline.prepare_position_ids(7, *size, 'cpu'))
    assert position_ids.cache_info().misses == 1


def test_the_distilled_form_has_one_shift_for_all_sizes(krea2, tmp_path):
    folder = Path(shutil.copytree(krea2.folder, tmp_path / 'turbo'))
    index = json.loads((folder / 'model_index.json').read_text())
    (folder / 'model_index.json').write_text(json.dumps(dict(index, is_distilled=True)))
    turbo = Tiny('turbo', Krea2Backbone, folder, guidance=krea2.guidance)
    method = turbo.method(image_size=(8, 12), sample_sigmas=SIGMAS)
    assert method.backbone.shift((4, 6)) == method.backbone.shift((8, 8)) == math.exp(1.15)
    noise = krea2.noise(4, 6)
    made = method.sample(method.backbone.condition(dict(prompt=PROMPTS)), noise)
    assert (made - turbo.images(noise, sigmas=SIGMAS)).abs().max() < 1e-5
    assert (made - krea2.images(noise, sigmas=SIGMAS)).abs().max() > 1e-3


def test_an_exported_pipeline_keeps_the_layers_of_its_text_encoder(krea2, tmp_path):
    """They are plain data beside the components, and the pipeline's defaults are the published model's."""
    folder = export(krea2.method(), tmp_path / 'out')
    source, written = (json.loads(Path(f, 'model_index.json').read_text()) for f in (krea2.folder, folder))
    assert written['text_encoder_select_layers'] == source['text_encoder_select_layers'] == [1, 3]
    assert written.keys() == source.keys()


@pytest.mark.parametrize('length', [200, 512])
@pytest.mark.parametrize('prompt', ['', 'a fox', 'fox' * 30, 'fox ' * 600, '猫 🦊'], ids=lambda x: str(x)[:8])
def test_texts_keep_their_length_and_are_counted_as_the_pipeline_takes_them(prompt, length, krea2):
    conditioner = krea2.method(backbone=dict(conditioner=dict(max_sequence_length=length))).backbone.conditioner
    with torch.no_grad():
        states, mask = krea2.pipeline.encode_prompt(prompt, max_sequence_length=length)
    found = conditioner.encode([prompt]).fields
    assert set(found) == {'encoder_hidden_states'}
    assert torch.allclose(found['encoder_hidden_states'], states[mask][None], rtol=0, atol=1e-5)
    (count,) = conditioner.count_tokens([prompt])
    # The template's end is 5 tokens of the real tokenizer; here, every byte is one.
    suffix = len(krea2.pipeline.tokenizer(krea2.pipeline.prompt_template_encode_suffix).input_ids)
    assert count.limit == length and min(count.lengths[0], length) - 5 + suffix == mask.sum()
    assert conditioner.truncated['Qwen3-VL'] == (count.lengths[0] > length) == bool(mask.all())
    assert conditioner.to_config()['max_sequence_length'] == length
