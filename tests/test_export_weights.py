"""Weights written one at a time, against safetensors' and diffusers' own writers and diffusers' own fusing."""
import json

import pytest
import tiny_pipelines
import torch
from diffusers import SD3Transformer2DModel
from mmengine.registry import MODELS
from safetensors.torch import load_file, save_file
from tests_support import perturb, tiny_method

from cdm_plugin.engine import StudentEMA
from cdm_plugin.export import export
from cdm_plugin.export import weights as export_weights
from cdm_plugin.export.weights import write_safetensors, write_weights
from cdm_plugin.roles.lora import save_lora

TENSORS = {
    'z': torch.arange(6.0).reshape(2, 3), 'scalar': torch.tensor(3.5), 'half': torch.ones(3).bfloat16(),
    'double': torch.full((1, 5), 0.1).double(), 'transposed': torch.arange(6.0).reshape(2, 3).t(),
    'empty': torch.zeros(0, 4), 'ids': torch.tensor([1, -2]), 'mask': torch.tensor([True, False, True]),
    'bytes': torch.tensor([7], dtype=torch.uint8), 'a.b': torch.randn(4).half(), 'ints': torch.tensor([5]).int()}


def shapes(tensors):
    return {name: tensor.to('meta') for name, tensor in tensors.items()}


def test_a_file_has_the_bytes_that_the_library_writes(tmp_path):
    write_safetensors(tmp_path / 'ours', shapes(TENSORS), TENSORS.get)
    save_file({name: tensor.contiguous() for name, tensor in TENSORS.items()}, tmp_path / 'theirs', dict(format='pt'))
    assert (tmp_path / 'ours').read_bytes() == (tmp_path / 'theirs').read_bytes()


def test_only_one_weight_is_asked_for_at_a_time_and_in_the_order_of_the_file(tmp_path):
    asked = []
    write_safetensors(tmp_path / 'a', shapes(TENSORS), lambda name: (asked.append(name), TENSORS[name])[1])
    assert sorted(asked) == sorted(TENSORS)
    header = json.loads((tmp_path / 'a').read_bytes()[8:].split(b'}}')[0] + b'}}')
    starts = [header[name]['data_offsets'][0] for name in asked]
    assert starts == sorted(starts)


@pytest.mark.parametrize('size', ['10GB', '20KB'], ids=['one file', 'several files'])
def test_a_folder_has_the_files_that_diffusers_writes(size, tmp_path, monkeypatch):
    network = SD3Transformer2DModel(
        sample_size=4, patch_size=2, in_channels=4, out_channels=4, pos_embed_max_size=4, num_layers=2,
        num_attention_heads=2, attention_head_dim=8, caption_projection_dim=16, joint_attention_dim=8,
        pooled_projection_dim=4)
    network.save_pretrained(tmp_path / 'theirs', max_shard_size=size)
    monkeypatch.setattr(export_weights, 'MAX_FILE', size)
    (tmp_path / 'ours').mkdir()
    network.save_config(tmp_path / 'ours')
    state = network.state_dict()
    write_weights(tmp_path / 'ours', shapes(state), state.get)
    ours, theirs = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ('ours', 'theirs'))
    assert ours.keys() == theirs.keys() and (len(ours) > 2) == (size == '20KB')
    assert ours == theirs


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float64'])
def test_a_fused_export_is_what_diffusers_fuses(dtype, tmp_path):
    tiny_pipelines.save_tiny_sd3(tmp_path / 'base')
    method = MODELS.build(dict(type='CDM', image_size=16, lora=dict(rank=3, alpha=6), backbone=dict(
        type='SD3Backbone', pretrained=str(tmp_path / 'base'), dtype=dtype, conditioner=dict(t5=False))))
    perturb(method.student)
    perturb(method.fake)
    method.student_ema = StudentEMA(method.student)
    for weight in method.student_ema.weights.values():
        weight.add_(0.05 * torch.randn_like(weight))
    out = export(method, tmp_path / 'out', fuse=True)
    with method.student_ema.applied():
        save_lora(method.student, str(tmp_path / 'lora'))
    network = SD3Transformer2DModel.from_pretrained(tmp_path / 'base', subfolder='transformer',
                                                    dtype=getattr(torch, dtype))
    network = network.double() if dtype == 'float64' else network.float()
    before = {name: w.clone() for name, w in network.state_dict().items()}
    network.load_lora_adapter(str(tmp_path / 'lora'), prefix='transformer', use_safetensors=True)
    network.fuse_lora()
    network.unload_lora()
    written = load_file(out / 'transformer/diffusion_pytorch_model.safetensors')
    assert written.keys() == before.keys()
    for name, weight in network.state_dict().items():
        assert torch.equal(written[name], weight), name
        assert torch.equal(weight, before[name]) != ('.to_' in name or '.add_' in name) or name.endswith('bias'), name


def test_a_diverged_adapter_is_named(tmp_path):
    method = MODELS.build(dict(type='CDM', lora=dict(rank=2), backbone=dict(
        type='SD3Backbone', pretrained='asset:digits/teacher')))
    with torch.no_grad():
        next(method.student.parameters()).fill_(float('nan'))
    with pytest.raises(ValueError, match='not finite, student.adapters.transformer_blocks-0-attn'):
        export(method, tmp_path / 'out', fuse=True)
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize('asked', [None, 'bfloat16'])
def test_whole_weights_are_written_in_their_own_dtype_or_the_one_asked_for(dtype, asked, tmp_path):
    method = tiny_method(dtype=dtype)
    method.student_ema = StudentEMA(method.student)
    for weight in method.student_ema.weights.values():
        weight.add_(1)
    written = load_file(export(method, tmp_path / 'out', dtype=asked)
                        / 'transformer/diffusion_pytorch_model.safetensors')
    own = dict(method.student.state_dict())
    assert written.keys() == own.keys()
    for name, weight in own.items():
        expected = method.student_ema.weights.get(name, weight)
        assert torch.equal(written[name], expected.to(dtype if asked is None else torch.bfloat16)), name
