"""ImageReward and HPSv3 from state dicts in their published layouts, against transformers' whole models."""
import sys

import pytest
import torch
from safetensors.torch import save_file
from tiny_judges import bert_tokenizer, literal_pixels, random_images, tiny_qwen
from transformers import AutoConfig, AutoTokenizer, BlipTextConfig, BlipVisionConfig, Qwen2VLModel
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from cdm_plugin.metrics import HPSv3, ImageReward, MissingMetric
from cdm_plugin.metrics.clip_scores import to_pictures
from cdm_plugin.metrics.weights import image_processor

PROMPTS = ['is there a red fox ?', 'the dog']
# BLIP's own repository -> transformers, the other way round from the judge's table.
VISION = [('embeddings.class_embedding', 'cls_token'), ('embeddings.position_embedding', 'pos_embed'),
          ('embeddings.patch_embedding.', 'patch_embed.proj.'), ('post_layernorm.', 'norm.'),
          ('encoder.layers.', 'blocks.'), ('layer_norm1', 'norm1'), ('layer_norm2', 'norm2'),
          ('self_attn.qkv', 'attn.qkv'), ('self_attn.projection', 'attn.proj')]


def published_names(state):
    for name, value in state.items():
        for ours, theirs in VISION:
            name = name.replace(ours, theirs)
        yield f'blip.visual_encoder.{name}', value


@pytest.fixture(scope='module')
def blip(tmp_path_factory):
    """A folder with ImageReward.pt and a tokenizer, and the models that are in it."""
    folder = tmp_path_factory.mktemp('image_reward')
    tokenizer = bert_tokenizer(folder)
    torch.manual_seed(0)
    vision = BlipVisionModel(BlipVisionConfig(
        hidden_size=64, intermediate_size=48, num_attention_heads=1, num_hidden_layers=2, image_size=32, patch_size=8,
        layer_norm_eps=1e-6, initializer_range=0.5)).eval()
    text = BlipTextModel(BlipTextConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=48, num_attention_heads=1, num_hidden_layers=2,
        encoder_hidden_size=64, max_position_embeddings=40, layer_norm_eps=1e-12, is_decoder=True,
        initializer_range=0.5), add_pooling_layer=False).eval()
    head = {}
    for place, (width_in, width_out) in zip((0, 2, 4, 6, 7), [(64, 32), (32, 16), (16, 8), (8, 4), (4, 1)]):
        head[f'mlp.layers.{place}.weight'] = torch.randn(width_out, width_in) / width_in ** 0.5
        head[f'mlp.layers.{place}.bias'] = torch.randn(width_out)
    state = dict(published_names(vision.state_dict()), **head)
    state.update({f'blip.text_encoder.{name}': value for name, value in text.state_dict().items()})
    state['blip.text_encoder.embeddings.position_ids'] = torch.arange(40)[None]
    torch.save(state, folder / 'ImageReward.pt')
    return str(folder), vision, text, head


def test_image_reward_is_the_standardised_head_of_the_first_token(blip):
    folder, vision, text, head = blip
    images = random_images(2)
    tokens = AutoTokenizer.from_pretrained(folder)(PROMPTS, padding='max_length', max_length=35, return_tensors='pt')
    with torch.no_grad():
        seen = vision(torch.stack([literal_pixels(image) for image in images])).last_hidden_state
        state = text(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, encoder_hidden_states=seen,
                     encoder_attention_mask=torch.ones(seen.shape[:2])).last_hidden_state[:, 0]
        for place in (0, 2, 4, 6, 7):
            state = state @ head[f'mlp.layers.{place}.weight'].T + head[f'mlp.layers.{place}.bias']
    expected = (state[:, 0] - 0.16717362830052426) / 1.0333394966054072
    metric = ImageReward(pretrained=folder, tokenizer=folder, device='cpu', batch_size=1)
    metric.prepare()
    torch.testing.assert_close(metric.rows(list(images), PROMPTS), expected, rtol=1e-4, atol=1e-4)
    assert (expected[0] - expected[1]).abs() > 0.01
    own = torch.stack(list(images)).requires_grad_()
    slope, = torch.autograd.grad(metric.reward(own, PROMPTS).sum(), own)
    assert slope.isfinite().all() and (slope.flatten(1).norm(dim=1) > 1e-3).all()


def test_pickled_objects_in_the_weights_are_not_unpickled(blip, tmp_path):
    torch.save(dict(thing=MissingMetric('x')), tmp_path / 'ImageReward.pt')
    with pytest.raises(Exception, match='(?i)weights.only|unsupported|pretrained'):
        ImageReward(pretrained=str(tmp_path), tokenizer=blip[0], device='cpu').prepare()


INSTRUCTION = 'Rate this image of {text_prompt} well. '
SPECIAL = 'So the rating is <|Reward|>.'


@pytest.fixture(scope='module')
def qwen(tmp_path_factory):
    """A folder with HPSv3.safetensors and the base's configuration; the model and the head in it; a package that has
    the instruction where the published one has it."""
    folder = tmp_path_factory.mktemp('hpsv3') / 'base'
    tiny_qwen(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(['<|Reward|>'], special_tokens=True)
    config = AutoConfig.from_pretrained(folder)
    config.text_config.vocab_size = len(tokenizer)
    torch.manual_seed(0)
    model = Qwen2VLModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(5)
    head = {f'rm_head.{place}.{kind}': value for place, sizes in ((0, (8, 16)), (3, (4, 8)), (5, (2, 4)))
            for kind, value in (('weight', torch.randn(sizes)), ('bias', torch.randn(sizes[0])))}
    state = {}
    for name, value in model.state_dict().items():  # the layout of transformers 4, in which they are published
        state[name if name.startswith('visual.') else f'model.{name.removeprefix("language_model.")}'] = value.clone()
    save_file({**state, **head}, folder / 'HPSv3.safetensors')
    package = tmp_path_factory.mktemp('packages') / 'hpsv3'
    (package / 'dataset').mkdir(parents=True)
    (package / '__init__.py').write_text('raise ImportError("it pins another transformers")\n')
    (package / 'dataset/data_collator_qwen.py').write_text(
        f'import no_such_package\nINSTRUCTION = {INSTRUCTION!r}\nprompt_with_special_token = {SPECIAL!r}\n')
    return folder, package.parent, model, head, tokenizer


def test_hpsv3_is_the_head_of_the_reward_token(qwen, monkeypatch):
    folder, packages, model, head, tokenizer = qwen
    monkeypatch.syspath_prepend(str(packages))
    images, expected = random_images(2, 56, 84), []
    area = 256 * 28 * 28
    processor = image_processor('Qwen2VLImageProcessor').from_pretrained(
        folder, size=dict(shortest_edge=area, longest_edge=area))
    for image, prompt in zip(images, PROMPTS):
        patches = processor(to_pictures(image[None]), return_tensors='pt')
        count = int(patches['image_grid_thw'].prod()) // 4
        text = ('<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>'
                + '<|image_pad|>' * count + '<|vision_end|>' + (INSTRUCTION + SPECIAL).replace('{text_prompt}', prompt)
                + '<|im_end|>\n<|im_start|>assistant\n')
        tokens = tokenizer(text, return_tensors='pt').input_ids
        with torch.no_grad():
            hidden = model(input_ids=tokens, pixel_values=patches['pixel_values'],
                           image_grid_thw=patches['image_grid_thw'],
                           position_ids=torch.arange(tokens.shape[1]).expand(3, 1, -1)).last_hidden_state
        x = hidden[0, tokens[0] == tokenizer.convert_tokens_to_ids('<|Reward|>')][0]
        for place in (0, 3, 5):
            x = x @ head[f'rm_head.{place}.weight'].T + head[f'rm_head.{place}.bias']
            x = x.relu() if place != 5 else x
        expected.append(x[0])
    metric = HPSv3(pretrained=str(folder), base=str(folder), dtype='float32', device='cpu')
    metric.prepare()
    found = metric.rows(list(images), PROMPTS)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-3, atol=1e-3)
    assert (found[0] - found[1]).abs() > 0.01 and 'hpsv3' not in sys.modules


def test_hpsv3_of_another_base_is_refused(qwen, monkeypatch, tmp_path):
    folder, packages, model, head, _ = qwen
    monkeypatch.syspath_prepend(str(packages))
    save_file({**{f'model.{k.removeprefix("language_model.")}': v.clone() for k, v in model.state_dict().items()
                  if 'layers.1' not in k and not k.startswith('visual.')}, **head}, tmp_path / 'HPSv3.safetensors')
    with pytest.raises(ValueError, match='not the weights of HPSv3 on this base model'):
        HPSv3(pretrained=str(tmp_path), base=str(folder), dtype='float32', device='cpu').prepare()


def test_hpsv3_without_its_package_says_so(qwen):
    with pytest.raises(MissingMetric, match='hpsv3'):
        HPSv3(pretrained=str(qwen[0]), base=str(qwen[0]), device='cpu').prepare()
