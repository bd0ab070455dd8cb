"""SD3 and SD3.5: their timestep, their text encoders' lengths, their sizes."""
import pytest
import torch
from diffusers import SD3Transformer2DModel
from tiny_pipelines import PROMPTS


def test_the_tiny_network_has_the_parts_of_both_versions(sd3):
    """SD3.5 normalises queries and keys, and some of its blocks have a second attention."""
    network = sd3.method().student
    first, last = network.transformer_blocks
    assert first.attn2 is not None and last.attn2 is None
    assert first.attn.norm_q is not None and first.attn.norm_added_k is not None


@pytest.mark.parametrize('version', [dict(), dict(qk_norm='rms_norm'),
                                     dict(qk_norm='rms_norm', dual_attention_layers=[0, 1])], ids=['3', '3.5', '3.5 M'])
def test_networks_of_each_version_load_and_train(version, sd3, tmp_path):
    config = {k: v for k, v in sd3.method().backbone.config.items()
              if not k.startswith('_') and k not in ('qk_norm', 'dual_attention_layers')}
    torch.manual_seed(0)
    network = SD3Transformer2DModel(**config, **version)
    network.save_pretrained(tmp_path / 'transformer')
    sd3.pipeline.scheduler.save_pretrained(tmp_path / 'scheduler')
    source = sd3.method().backbone
    method = sd3.method(backbone=dict(pretrained=str(tmp_path), conditioner=source.conditioner.to_config(),
                                      codec=source.codec.to_config()))
    loaded = method.student.state_dict()
    assert loaded.keys() == network.state_dict().keys()
    assert all(torch.equal(loaded[k], v) for k, v in network.state_dict().items())
    condition = method.backbone.condition(dict(prompt=PROMPTS))
    method.velocity('student', sd3.noise(), torch.rand(2), condition).square().mean().backward()
    # The last block's text stream ends there, and with it that stream's query.
    unused = {n for n, p in method.student.named_parameters() if p.grad is None}
    assert all('norm_added_q' in n or 'add_q_proj' in n for n in unused)


def test_timestep_is_a_thousand_sigma(sd3):
    method, sigma = sd3.method(), torch.tensor([0.9, 0.25])
    condition = method.backbone.condition(dict(prompt=PROMPTS))
    velocity = method.velocity('student', sd3.noise(), sigma, condition)
    with torch.no_grad():
        expected = sd3.pipeline.transformer(
            hidden_states=sd3.noise(), timestep=torch.tensor([900.0, 250.0]), return_dict=False, **condition.fields)[0]
    assert torch.allclose(velocity, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize('length', [16, 77, 512])
def test_t5_takes_as_many_tokens_as_asked(length, sd3):
    conditioner = sd3.method(backbone=dict(conditioner=dict(max_sequence_length=length))).backbone.conditioner
    with torch.no_grad():
        tokens, _, pooled, _ = sd3.pipeline.encode_prompt(
            prompt=PROMPTS, prompt_2=None, prompt_3=None, max_sequence_length=length)
    fields = conditioner.encode(PROMPTS).fields
    assert torch.allclose(fields['encoder_hidden_states'], tokens, rtol=0, atol=1e-5)
    assert torch.allclose(fields['pooled_projections'], pooled, rtol=0, atol=1e-5)
    # A T5 token is a byte here, and </s> is one too.
    assert conditioner.truncated['T5'] == sum(len(p) + 1 > length for p in PROMPTS)


@pytest.mark.parametrize('size', [(36, 32), (16, 48)], ids=str)
def test_sizes_beyond_the_positions_are_refused(size, sd3):
    with pytest.raises(ValueError, match=r'image size .*must be multiples of 4 pixels up to 32'):
        sd3.method(image_size=size)
