"""Weights written one at a time, against safetensors' and diffusers' own writers and diffusers' own fusing."""
import json
import re

import pytest
import tiny_pipelines
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from mmengine.registry import MODELS
from safetensors.torch import load_file, save_file
from tests_support import perturb, tiny_method

from cdm_plugin.engine import StudentEMA
from cdm_plugin.export import check_export, export
from cdm_plugin.export import weights as export_weights
from cdm_plugin.export.weights import write_safetensors, write_weights
from cdm_plugin.inference import load_method
from cdm_plugin.roles.lora import save_lora

TENSORS = {
    'z': torch.arange(6.0).reshape(2, 3), 'scalar': torch.tensor(3.5), 'half': torch.ones(3).bfloat16(),
    'double': torch.full((1, 5), 0.1).double(), 'transposed': torch.arange(6.0).reshape(2, 3).t(),
    'empty': torch.zeros(0, 4), 'ids': torch.tensor([1, -2]), 'mask': torch.tensor([True, False, True]),
    'bytes': torch.tensor([7], dtype=torch.uint8), 'a.b': torch.randn(4).half(), 'ints': torch.tensor([5]).int(),
    'narrow': torch.tensor([[0.5, -448.0, 0.002]]).to(torch.float8_e4m3fn)}


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


def float8_student(tmp_path, **kwargs):
    """A student of a tiny SD3 whose weights differ from the teacher's, and its export in float8."""
    tiny_pipelines.save_tiny_sd3(tmp_path / 'base', t5=False)
    method = MODELS.build(dict(type='CDM', image_size=16, backbone=dict(
        type='SD3Backbone', pretrained=str(tmp_path / 'base'), conditioner=dict(t5=False)), **kwargs)).eval()
    perturb(method.student)
    return method, export(method, tmp_path / 'out', dtype='float8', fuse='lora' in kwargs)


def test_float8_is_what_diffusers_layerwise_casting_keeps(tmp_path, monkeypatch):
    method, out = float8_student(tmp_path)
    expected = SD3Transformer2DModel.from_config(method.student.config)
    expected.load_state_dict(method.student.state_dict())
    expected.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    expected = expected.state_dict()
    written = load_file(out / 'transformer/diffusion_pytorch_model.safetensors')
    assert written.keys() == expected.keys()
    kept = {name for name, weight in written.items() if weight.dtype == torch.bfloat16}
    assert 'proj_out.weight' in kept and not any('attn.to_q' in name or '.ff.' in name for name in kept)
    for name, weight in written.items():
        theirs = expected[name].to(torch.bfloat16) if name in kept else expected[name]
        assert weight.dtype == theirs.dtype and torch.equal(weight.float(), theirs.float()), name
    others = [load_file(file) for file in out.rglob('*.safetensors') if file.parent.name != 'transformer']
    assert {w.dtype for weights in others for w in weights.values() if w.is_floating_point()} == {torch.bfloat16}
    card = (out / 'README.md').read_text()
    assert '| dtype of the files | float8_e4m3fn (linear layers), bfloat16 |' in card
    code, scope = re.search(r'```python\n(.*?)```', card, re.DOTALL).group(1), {}
    with monkeypatch.context() as patch:
        patch.chdir(out)
        exec(code, scope)
    # The card's pipeline keeps the files' weights, and makes the images that it makes without the casting.
    opened = scope['pipeline'].transformer.state_dict()
    assert all(w.dtype == written[name].dtype and torch.equal(w.float(), written[name].float())
               for name, w in opened.items())
    plain = StableDiffusion3Pipeline.from_pretrained(out, dtype=torch.bfloat16, text_encoder_3=None, tokenizer_3=None)
    assert {w.dtype for w in plain.transformer.state_dict().values()} == {torch.bfloat16}
    calls = dict(prompt='a fox', height=16, width=16, num_inference_steps=2, guidance_scale=1.0, output_type='pt')
    a, b = (pipeline(generator=torch.Generator().manual_seed(0), **calls).images
            for pipeline in (scope['pipeline'], plain))
    assert torch.equal(a, b)
    loaded = load_method(str(out), device='cpu').student.state_dict()
    assert all(torch.equal(w, written[name].float()) for name, w in loaded.items())


def test_fused_adapters_go_to_float8_at_once(tmp_path):
    method, out = float8_student(tmp_path, lora=dict(rank=3, alpha=6))
    layer = method.base.transformer_blocks[0].attn.to_q
    fused = layer.base_layer.weight + 2 * layer.lora_B['student'].weight @ layer.lora_A['student'].weight
    written = load_file(out / 'transformer/diffusion_pytorch_model.safetensors')
    written = written['transformer_blocks.0.attn.to_q.weight']
    assert written.dtype == torch.float8_e4m3fn
    assert torch.equal(written.float(), fused.detach().to(torch.float8_e4m3fn).float())


def test_what_float8_has_no_room_for_is_named(tmp_path):
    method = tiny_method(dtype=torch.float32)
    next(m for n, m in method.student.named_modules() if n.endswith('attn.to_k')).weight.data[0, 0] = -449
    with pytest.raises(ValueError, match=r'transformer_blocks.0.attn.to_k.weight has values up to 449, .*bfloat16'):
        export(method, tmp_path / 'out', dtype='float8')
    with pytest.raises(ValueError, match=r"dtype='float8' is for whole weights.*--fuse"):
        check_export(MODELS.build(dict(type='CDM', lora=dict(rank=2), backbone=dict(
            type='SD3Backbone', pretrained='asset:digits/teacher'))), tmp_path / 'out', dtype='float8')
    assert not (tmp_path / 'out').exists()
