"""FLUX.2-dev: embedded guidance, texts in its system message; what it shares with -klein is tested there."""
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers.pipelines.flux2.pipeline_flux2 import format_input
from tiny_pipelines import PROMPTS

from cdm_plugin.backbones import Flux2Backbone, Flux2KleinBackbone
from cdm_plugin.export import export
from cdm_plugin.inference import load_method

SIGMAS = [1.0, 0.75, 0.5, 0.25]


@pytest.mark.parametrize('embedded', [None, 1.0, 2.5])
def test_images_with_embedded_guidance_equal_the_pipelines(embedded, flux2):
    noise, given = flux2.noise(4, 6), {} if embedded is None else dict(embedded_guidance=embedded)
    method = flux2.method(backbone=given, image_size=(16, 24), sample_sigmas=SIGMAS)
    made = method.sample(method.backbone.condition(dict(prompt=PROMPTS)), noise)
    kwargs = {} if embedded is None else dict(guidance_scale=embedded)
    assert (made - flux2.images(noise, sigmas=SIGMAS, **kwargs)).abs().max() < 1e-5
    assert (made - flux2.images(noise, sigmas=SIGMAS, guidance_scale=5.0)).abs().max() > 1e-3


def test_the_usual_settings(flux2):
    """The pipeline's own guidance_scale is the embedded guidance."""
    backbone = flux2.method().backbone
    assert backbone.pipeline_defaults() == dict(guidance_scale=1.0, num_inference_steps=50)
    assert backbone.embedded_guidance == 4.0 and backbone.pipeline_guidance(1.0) == dict(guidance_scale=4.0)
    assert backbone.default_latent_size() == (64, 64) and backbone.latent_channels == 16


def test_an_exported_model_keeps_its_embedded_guidance_and_its_processor(flux2, tmp_path):
    """Whose files nothing here opens: it needs torchvision."""
    source = Path(shutil.copytree(flux2.folder, tmp_path / 'source'))
    index = json.loads((source / 'model_index.json').read_text())
    index['tokenizer'] = ['transformers', 'PixtralProcessor']
    (source / 'model_index.json').write_text(json.dumps(index))
    (source / 'tokenizer' / 'processor_config.json').write_text('{"patch_size": 14}')
    method = flux2.method(backbone=dict(pretrained=str(source), embedded_guidance=1.5)).eval()
    folder = export(method, tmp_path / 'out')
    exported = load_method(str(folder), device='cpu')
    assert exported.backbone.embedded_guidance == 1.5
    condition, noise = exported.backbone.condition(dict(prompt=PROMPTS)), flux2.noise()
    assert torch.equal(*(m.sample(condition, noise, method.sample_sigmas) for m in (exported, method)))
    assert json.loads((folder / 'model_index.json').read_text())['tokenizer'] == index['tokenizer']
    assert (folder / 'tokenizer' / 'processor_config.json').read_text() == '{"patch_size": 14}'


@pytest.mark.parametrize('name, given, fitting', [('flux2', Flux2KleinBackbone, 'Flux2Backbone'),
                                                  ('klein', Flux2Backbone, 'Flux2KleinBackbone')])
def test_the_other_flux2_is_refused(name, given, fitting, tinies):
    """Their networks have one class and their texts one width."""
    tiny = tinies(name)
    with pytest.raises(ValueError, match=rf"pretrained='{tiny.folder}' has guidance_embeds=.*: set model\.backbone\."
                                         rf"type='{fitting}'"):
        given(pretrained=tiny.folder)


@pytest.mark.parametrize('length', [180, 512])
@pytest.mark.parametrize('prompt', ['', 'a fox', 'fox ' * 600, '猫 🦊'], ids=lambda x: str(x)[:8])
def test_texts_have_one_length_and_are_counted_as_the_pipeline_takes_them(prompt, length, flux2):
    conditioner = flux2.method(backbone=dict(conditioner=dict(max_sequence_length=length))).backbone.conditioner
    taken = flux2.pipeline.tokenizer.apply_chat_template(format_input([prompt]), return_dict=True)['input_ids'][0]
    assert len(taken) > len(flux2.pipeline.system_message)  # a byte a token
    (count,) = conditioner.count_tokens([prompt])
    assert (count.limit, count.lengths) == (length, [len(taken)])
    with torch.no_grad():
        states, _ = flux2.pipeline.encode_prompt(prompt, max_sequence_length=length)
    found = conditioner.encode([prompt]).fields
    assert set(found) == {'encoder_hidden_states'} and states.shape == (1, length, 24)
    assert torch.allclose(found['encoder_hidden_states'], states, rtol=0, atol=1e-5)
    assert conditioner.truncated['Mistral 3'] == (len(taken) > length)
    assert conditioner.to_config()['max_sequence_length'] == length


def test_the_tokenizer_alone_gives_the_processors_tokens(flux2, tmp_path):
    pytest.importorskip('torchvision', reason='PixtralProcessor takes pictures too, by torchvision')
    from transformers import AutoTokenizer, PixtralImageProcessor, PixtralProcessor
    tokenizer = flux2.pipeline.tokenizer
    PixtralProcessor(PixtralImageProcessor(), tokenizer, patch_size=14, chat_template=tokenizer.chat_template
                     ).save_pretrained(tmp_path)
    for length in (180, 512):
        taken = [part.apply_chat_template(
            format_input(['', 'fox ' * 600, '猫 🦊']), tokenize=True, return_dict=True, return_tensors='pt',
            padding='max_length', truncation=True, max_length=length) for part in (
                PixtralProcessor.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path))]
        for name in ('input_ids', 'attention_mask'):
            assert torch.equal(taken[0][name], taken[1][name])
