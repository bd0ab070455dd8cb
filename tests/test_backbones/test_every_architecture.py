"""What holds for every architecture: images and embeddings as its own pipeline makes them, and training."""
import contextlib
import re
import shutil

import pytest
import torch
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from mmengine.registry import MODELS
from tests_support import recording_optimizers
from tiny_pipelines import PROMPTS
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from cdm_plugin.backbones import Backbone
from cdm_plugin.condition import Condition
from cdm_plugin.export import export
from cdm_plugin.inference import load_method, sample_prompts, step_sigmas

SIGMAS = [1.0, 0.75, 0.5, 0.25]
GUIDANCE = dict(sd3=7.0, longcat=4.5, flux=3.0, z_image=5.0, qwen_image=4.0, klein=4.0,
                flux2=None, krea2=5.5)
ENCODERS = dict(sd3=['CLIP', 'T5'], longcat=['Qwen2.5-VL'], flux=['CLIP', 'T5'], z_image=['Qwen3'],
                qwen_image=['Qwen2.5-VL'], klein=['Qwen3'], flux2=['Mistral 3'], krea2=['Qwen3-VL'])
BLOCKS = dict(sd3=2, longcat=2, flux=2, z_image=3, qwen_image=2, klein=2, flux2=2, krea2=2)
# What has no effect: of the last block's text, everything but keys and values.
IDLE = dict(sd3=r'blocks\.1\.attn\.(add_q_proj|norm_added_q)',
            qwen_image=r'blocks\.1\.attn\.(add_q_proj|norm_added_q|to_add_out)')
# Whose pipelines have no guidance by default: it is embedded, or takes a negative prompt.
UNGUIDED = ('flux', 'flux2', 'qwen_image')
# Whose texts have lengths of their own.
RAGGED = ('z_image', 'qwen_image', 'krea2')
# Names of what a small network of one's own has other values for.
TEXT_WIDTH = dict(z_image='cap_feat_dim', krea2='text_hidden_dim')
LONG = 'a red fox in the snow ' * 400


def ours(tiny, noise, guidance_scale=1.0, sigmas=SIGMAS, **kwargs):
    scale = tiny.scale
    method = tiny.method(image_size=[scale * side for side in noise.shape[2:]], **kwargs)
    assert method.latent_shape(2) == noise.shape
    condition = method.backbone.condition(dict(prompt=PROMPTS))
    return method.sample(condition, noise, torch.as_tensor(sigmas, dtype=torch.float64), guidance_scale=guidance_scale)


@pytest.mark.parametrize('size', [(8, 8), (4, 6)], ids=['square', 'wide'])
@pytest.mark.parametrize('guided', [False, True], ids=['unguided', 'guided'])
def test_images_equal_the_pipelines(tiny, guided, size):
    usual, noise = GUIDANCE[tiny.name], tiny.noise(*size)
    if guided and usual is None:
        pytest.skip('its pipeline has no classifier-free guidance')
    scale = usual if guided else 1.0
    theirs = tiny.images(noise, scale, sigmas=SIGMAS)
    made = ours(tiny, noise, scale)
    assert made.shape == theirs.shape and (made - theirs).abs().max() < 1e-5
    assert (made[0] - made[1]).abs().max() > 1e-2  # not saturated
    other = ours(tiny, noise, 1.0 if guided else usual or 4.0)
    assert (other - theirs).abs().max() > 1e-3


def test_the_usual_schedule_equals_the_pipelines(tiny):
    """And, where a pipeline's default call has no guidance on top, that call with a number of steps alone."""
    noise = tiny.noise(4, 8)
    if tiny.name == 'sd3':  # its scheduler starts from its own range of timesteps
        scheduler = tiny.pipeline.scheduler
        sigmas = torch.linspace(scheduler.sigma_max, scheduler.sigma_min, 5, dtype=torch.float64)
    else:
        sigmas = step_sigmas(5)
    made, guidance = ours(tiny, noise, sigmas=sigmas), None if tiny.name in UNGUIDED else 1.0
    assert (made - tiny.images(noise, guidance, num_inference_steps=5)).abs().max() < 1e-5


def test_the_shift_is_the_schedulers(tiny):
    """For the number of tokens of each size."""
    backbone = tiny.method().backbone
    for size in ((8, 8), (4, 6), (64, 128)):
        sigmas, mu = torch.tensor([1.0, 0.9, 0.4, 0.05], dtype=torch.float64), {}
        config = backbone.scheduler.config
        if config.use_dynamic_shifting:
            slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
            mu = dict(mu=config.base_shift + slope * (size[0] * size[1] // 4 - config.base_image_seq_len))
            if tiny.packed == 2:  # FLUX.2
                mu = dict(mu=compute_empirical_mu(size[0] * size[1], len(sigmas)))
        backbone.scheduler.set_timesteps(sigmas=sigmas.tolist(), **mu)
        shifted = backbone.shift_grid(sigmas, size)
        atol = 2e-5 if config.shift_terminal else 1e-6  # diffusers stretches 1 - sigma, small here, in float32
        assert torch.allclose(shifted.float(), backbone.scheduler.sigmas[:-1], rtol=0, atol=atol)
        assert (shifted - sigmas).abs().max() > 0.04


@pytest.mark.parametrize('scheduler', [dict(use_dynamic_shifting=True, time_shift_type='linear'), dict(shift=2.0)],
                         ids=['linear', 'constant'])
def test_other_shifts_are_the_schedulers(longcat, scheduler):
    backbone = longcat.method(backbone=dict(scheduler=scheduler)).backbone
    sigmas = torch.tensor([1.0, 0.7, 0.2])
    backbone.scheduler.set_timesteps(sigmas=sigmas.tolist(), mu=0.5 + 0.65 * (512 - 256) / (4096 - 256))
    shifted = backbone.shift_sigmas(sigmas, (32, 64))
    assert torch.allclose(shifted, backbone.scheduler.sigmas[:-1], rtol=0, atol=1e-6)


def encode_prompt(tiny, prompts):
    extra = dict(sd3=dict(prompt_2=None, prompt_3=None, do_classifier_free_guidance=False)).get(tiny.name, {})
    with torch.no_grad():
        parts = tiny.pipeline.encode_prompt(prompt=list(prompts), **extra)
    if tiny.name in ('z_image', 'krea2'):
        texts = parts[0]  # a list, each text as long as it is, or padded in the middle
        if tiny.name == 'krea2':
            texts = [states[own] for states, own in zip(*parts)]
        fields = dict(encoder_hidden_states=pad_sequence(texts, batch_first=True))
        lengths = torch.tensor([len(states) for states in texts])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        return fields if mask.all() else {**fields, 'encoder_hidden_states_mask': mask}
    fields = dict(encoder_hidden_states=parts[0])
    if tiny.name == 'qwen_image' and parts[1] is not None:
        fields['encoder_hidden_states_mask'] = parts[1].bool()
    if tiny.name in ('sd3', 'flux'):
        fields['pooled_projections'] = parts[2 if tiny.name == 'sd3' else 1]
    return fields


def assert_same(condition, fields, atol=1e-5):
    assert condition.fields.keys() == fields.keys()
    for name, expected in fields.items():
        found = condition.fields[name]
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype) and not found.requires_grad
        assert torch.allclose(found.float(), expected.float(), rtol=0, atol=atol)


def test_embeddings_equal_encode_prompt(tiny):
    conditioner = tiny.method(backbone=dict(conditioner=dict(negative_prompt='blurry'))).backbone.conditioner
    expected = encode_prompt(tiny, PROMPTS)
    assert_same(conditioner.encode(PROMPTS), expected)
    assert_same(conditioner.null(), encode_prompt(tiny, ['blurry']))
    for field in expected.values():
        assert (field[0].float() - field[1].float()).abs().max() > 1e-2


def test_an_empty_text_is_the_default_null_condition(tiny):
    backbone = tiny.method().backbone
    assert_same(backbone.conditioner.null(), encode_prompt(tiny, ['']))
    backbone.check_condition(backbone.conditioner.null())


def test_every_text_encodes_and_only_long_ones_are_counted(tiny, warned):
    conditioner = tiny.method().backbone.conditioner
    prompts = ['', 'a', LONG, 'a cat ' * 10, '一只猫在雪地里', '🦊❄️ 👩‍🚀']
    assert len(LONG.split()) == 2400
    condition = conditioner.encode(prompts)
    alone = conditioner.encode(prompts[3:4])
    for name in alone.fields:
        field = condition.fields[name]
        assert len(field) == 6 and field.isfinite().all()
        differences = [(field[i] - field[j]).abs().max() for i in range(6) for j in range(i)]
        assert min(differences) > 1e-3, name
        # A prompt's row does not depend on those beside it.
        own = field[3:4, :alone.fields[name].shape[1]]
        assert torch.allclose(alone.fields[name], own, rtol=0, atol=1e-5)
        if name in condition.masked:
            mask = condition.fields[f'{name}_mask']
            assert mask[3].sum() == own.shape[1] < mask.shape[1] == mask[2].sum()
    encoders = ENCODERS[tiny.name]
    assert conditioner.truncated == {name: 1 for name in encoders}
    for _ in range(3):
        conditioner.encode([LONG, 'a', LONG])
    assert conditioner.truncated == {name: 7 for name in encoders}
    # One warning an encoder, for all batches; CLIP's must not hide T5's, which takes more.
    assert len(warned['ours']) == len(encoders)
    for name, text in zip(encoders, warned['ours']):
        assert f'that {name} takes, its end is left out' in text
    assert warned['diffusers'] == [] and warned['transformers'] == []


def test_chinese_and_emoji_are_real_tokens(tiny):
    """Without which the test above would compare encodings of the unknown token."""
    for name, tokenizer in tiny.pipeline.components.items():
        if name.startswith('tokenizer'):
            ids = tokenizer('猫🦊').input_ids
            assert len(set(ids)) > 4 and tokenizer.unk_token_id not in ids[:-1]


def test_offloaded_encoders_encode_the_same_and_stay_behind(tiny):
    here = tiny.method().backbone
    there = tiny.method(backbone=dict(conditioner=dict(offload=True))).backbone
    assert_same(there.condition(dict(prompt=PROMPTS)), here.condition(dict(prompt=PROMPTS)).fields, atol=0)
    assert_same(there.conditioner.null(), here.conditioner.null().fields, atol=0)
    assert list(there.conditioner.parameters()) == [] and len(list(here.conditioner.parameters())) > 10
    for backbone, dtype in ((here, torch.float64), (there, torch.float32)):  # what .to() reaches
        backbone.to(torch.float64)
        assert {p.dtype for p in backbone.conditioner.encoders.parameters()} == {dtype}


def test_encoders_of_the_pipeline_are_loaded_and_nothing_else(tiny):
    pipeline = tiny.method().backbone.conditioner.pipeline
    assert pipeline.transformer is None or {p.device.type for p in pipeline.transformer.parameters()} == {'meta'}
    assert pipeline.vae is None


def test_autoencoder_equals_diffusers(tiny):
    codec, vae = tiny.method().backbone.codec, tiny.pipeline.vae
    images = 2 * torch.rand(2, 3, 2 * tiny.size, tiny.size, generator=torch.Generator().manual_seed(0)) - 1
    with torch.no_grad():
        if tiny.name in ('qwen_image', 'krea2'):  # videos of one frame, and numbers for each channel
            mean, std = (torch.tensor(vae.config[f'latents_{key}']).reshape(1, -1, 1, 1, 1) for key in ('mean', 'std'))
            latents = ((vae.encode(images[:, :, None]).latent_dist.mode() - mean) / std)[:, :, 0]
            decoded = vae.decode(latents[:, :, None] * std + mean, return_dict=False)[0][:, :, 0]
        elif tiny.packed == 2:  # as FLUX.2's pipelines encode a picture to edit, and decode
            latents = tiny.pipeline._encode_vae_image(images, None)
            mean, variance = (t.reshape(1, -1, 1, 1) for t in (vae.bn.running_mean, vae.bn.running_var))
            unpacked = tiny.pipeline._unpatchify_latents(latents * (variance + vae.config.batch_norm_eps).sqrt() + mean)
            decoded = vae.decode(unpacked, return_dict=False)[0]
        else:
            latents = (vae.encode(images).latent_dist.mode() - vae.config.shift_factor) * vae.config.scaling_factor
            decoded = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False)[0]
    assert codec.scale == tiny.scale
    assert torch.allclose(codec.encode(images), latents, rtol=0, atol=1e-5)
    assert torch.allclose(codec.decode(latents), decoded.clamp(-1, 1), rtol=0, atol=1e-5)
    lazy = tiny.method(backbone=dict(codec=dict(lazy=True))).backbone.codec
    assert not lazy.loaded and lazy.scale == codec.scale and not list(lazy.parameters())
    assert torch.equal(lazy.decode(latents), codec.decode(latents)) and lazy.loaded


# The network's parts that a backbone names


def test_named_parts_are_in_the_network(tiny):
    backbone = tiny.method().backbone
    network = backbone.build_network()
    kinds = [type(m).__name__ for m in network.modules()]
    blocks = [m for m in network.modules() if type(m).__name__ in backbone.repeated_blocks]
    assert set(backbone.repeated_blocks) <= set(kinds)
    # Every block of the trunk is one of them.
    trunk = [m for child in network.children() if isinstance(child, nn.ModuleList) for m in child]
    assert blocks == trunk and len(blocks) == BLOCKS[tiny.name]
    linears = {name for name, m in network.named_modules() if isinstance(m, nn.Linear)}
    for target in backbone.lora_targets:
        assert any(f'.{name}'.endswith(f'.{target}') for name in linears), target
    attention = {n for n in linears if re.search(r'\.attn|\.attention\.', n)}  # SD3.5 has attn and attn2
    assert attention == {n for n in linears if f'.{n}'.endswith(tuple(f'.{t}' for t in backbone.lora_targets))}
    widths = []
    network.get_submodule(backbone.time_embedder).register_forward_hook(lambda m, a, out: widths.append(out.shape[-1]))
    backbone.velocity(network, tiny.noise(), torch.rand(2), backbone.condition(dict(prompt=PROMPTS)))
    assert widths == [backbone.time_embedding_width()]
    with pytest.raises(NotImplementedError):
        Backbone.call(backbone, network, None, None, None)


def test_velocity_is_float32_of_any_network(tiny):
    backbone = tiny.method().backbone
    condition, sigma = backbone.condition(dict(prompt=PROMPTS)), torch.tensor([0.9, 0.3])
    velocities = {}
    for dtype in (torch.float32, torch.bfloat16):
        network = backbone.build_network(dtype)
        assert network.dtype == dtype
        velocities[dtype] = backbone.velocity(network, tiny.noise(), sigma, condition)
        assert velocities[dtype].dtype == torch.float32 and velocities[dtype].shape == tiny.noise().shape
    error = (velocities[torch.float32] - velocities[torch.bfloat16]).abs().max()
    assert 0 < error < 0.05 * velocities[torch.float32].abs().max()


def test_a_new_network_needs_only_its_dimensions(tiny):
    """Without pretrained weights, with class labels and pixels, the shipped recipes' way."""
    backbone = tiny.method().backbone
    config = {**backbone.config, TEXT_WIDTH.get(tiny.name, 'joint_attention_dim'): 8}
    channels = backbone.latent_channels // 4 * 4
    if 'pooled_projection_dim' in config:
        config['pooled_projection_dim'] = 4
    if tiny.name == 'longcat':
        config['in_channels'], channels = 16, 4
    codec = dict(type='PixelCodec', scale=2)
    method = MODELS.build(dict(type='FlowMatching', image_size=16, backbone=dict(
        type=type(backbone).__name__, config=config, codec=codec,
        conditioner=dict(type='ClassConditioner', num_classes=3))))
    assert method.latent_shape(2) == (2, channels, 8, 8)
    condition = method.backbone.condition(dict(prompt=[0, 2]))
    noise = torch.randn(method.latent_shape(2))
    assert method.velocity('student', noise, torch.tensor([0.5, 1.0]), condition).shape == noise.shape


def test_an_exported_model_samples_by_itself(tiny, tmp_path):
    method = tiny.method()
    exported = load_method(str(export(method, tmp_path / 'out')), device='cpu')
    noise = tiny.noise()
    images = [sample_prompts(m, PROMPTS, noise, sigmas=method.sample_sigmas, guidance_scale=2.0)
              for m in (method.eval(), exported)]
    assert torch.equal(*images)


# Texts of different lengths


@pytest.mark.parametrize('name', RAGGED)
def test_padding_further_changes_nothing(name, tinies):
    """A row alone, a row beside longer ones, and any junk under the mask."""
    tiny = tinies(name)
    method = tiny.method()
    prompts, noise = ['a', *PROMPTS, '猫 ' * 40], tiny.noise().repeat(2, 1, 1, 1)
    sigma = torch.tensor([0.9, 0.3, 0.5, 1])
    encode = method.backbone.conditioner.encode
    condition = encode(prompts)
    (field,) = condition.masked
    states, mask = condition.fields[field], condition.fields[f'{field}_mask']
    together = method.velocity('student', noise, sigma, condition)
    junk = Condition(dict(condition.fields, **{
        field: torch.where(mask.reshape(*mask.shape, *[1] * (states.ndim - 2)), states, states + 9)}))
    assert torch.allclose(method.velocity('student', noise, sigma, junk), together, rtol=0, atol=1e-6)
    for i in range(4):
        alone = encode(prompts[i:i + 1])
        assert alone.masked == []
        velocity = method.velocity('student', noise[i:i + 1], sigma[i:i + 1], alone)
        assert torch.allclose(velocity, together[i:i + 1], rtol=0, atol=1e-5)
    unmasked = Condition({field: condition.fields[field]})
    assert (method.velocity('student', noise, sigma, unmasked)[0] - together[0]).abs().max() > 1e-3


# Activation checkpointing and half precision


def gradients(method, condition, noise, autocast):
    blocks, calls = set(method.backbone.repeated_blocks), [0]
    first = next(m for m in method.student.modules() if type(m).__name__ in blocks)
    handle = first.register_forward_pre_hook(lambda *args: calls.__setitem__(0, calls[0] + 1))
    method.student.zero_grad()
    with torch.autocast('cpu', torch.bfloat16) if autocast else contextlib.nullcontext():
        velocity = method.backbone.velocity(method.student, noise, torch.tensor([0.9, 0.3]), condition)
        loss = velocity.square().mean()
    loss.backward()
    handle.remove()
    found = {n: p.grad.float() for n, p in method.student.named_parameters() if p.grad is not None}
    assert len(found) > 20 and all(gradient.isfinite().all() for gradient in found.values())
    return velocity.detach(), found, calls[0]


@pytest.mark.parametrize('precision', ['float32', 'autocast', 'bfloat16'])
def test_checkpointing_changes_no_gradient(precision, tiny):
    method, autocast = tiny.method(), precision == 'autocast'
    if precision == 'bfloat16':
        method.student.to(torch.bfloat16)
    condition, noise = method.backbone.condition(dict(prompt=PROMPTS)), tiny.noise()
    velocity, expected, calls = gradients(method, condition, noise, autocast)
    assert calls == 1 and velocity.dtype == torch.float32
    method.student.enable_gradient_checkpointing()
    again, found, calls = gradients(method, condition, noise, autocast)
    assert calls == 2  # forward, and again in backward
    bound = 1e-6 if precision == 'float32' else 0.02
    assert (again - velocity).abs().max() <= bound * velocity.abs().max()
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (gradient.abs().max() > 0) != bool(re.search(IDLE.get(tiny.name, '$^'), name)), name
        assert (found[name] - gradient).abs().max() <= bound * max(gradient.abs().max(), 1e-3), name


def test_half_precision_stays_near_float32(tiny):
    method = tiny.method()
    condition, noise = method.backbone.condition(dict(prompt=PROMPTS)), tiny.noise()
    velocity, expected, _ = gradients(method, condition, noise, False)
    with_autocast = gradients(method, condition, noise, True)
    method.student.to(torch.bfloat16)
    for half, found, _ in (with_autocast, gradients(method, condition, noise, False)):
        assert 0 < (half - velocity).abs().max() < 0.05 * velocity.abs().max()
        parts = {name.partition('.')[0] for name in expected}  # the embedders, the blocks, the last layers
        assert len(parts) > 3
        for part in parts:
            a, b = (torch.cat([g.flatten() for name, g in sorted(grads.items()) if name.partition('.')[0] == part])
                    for grads in (found, expected))
            assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.98, part


# Training


@pytest.mark.parametrize('type', ['CDM', 'DMD2', 'DecoupledDMD'])
def test_a_step_of_every_method_trains_the_student(tiny, type):
    torch.manual_seed(0)
    method = tiny.method(type, student_every=1, fake_merge=0.0, anchor_aware_fake=True).train()
    method.seed, method.iteration = 5, 0
    before = {role: {n: p.clone() for n, p in getattr(method, role).named_parameters()}
              for role in ('student', 'fake', 'teacher')}
    encoders = [p.clone() for p in method.backbone.conditioner.parameters()]
    optimizers = recording_optimizers(method, lr=0.01)
    logs = method.train_step(dict(prompt=PROMPTS), optimizers)
    assert logs['loss_fake'] > 0 and all(torch.as_tensor(v).isfinite().all() for v in logs.values())
    for role in ('student', 'fake'):
        gradients = [g for g in optimizers[role].gradients if g is not None]
        assert all(g.isfinite().all() for g in gradients) and sum(g.abs().sum() for g in gradients) > 0
    for role, changes in (('student', True), ('fake', True), ('teacher', False)):
        now = dict(getattr(method, role).named_parameters())
        assert any(not torch.equal(p, now[n]) for n, p in before[role].items()) == changes
    # The anchor reaches the fake score, through its time embedding.
    embedding = {n: g for (n, _), g in zip(method.fake.named_parameters(), optimizers['fake'].gradients)}
    assert embedding['anchor_embedding.embedding.linear_2.weight'].abs().sum() > 0
    assert all(torch.equal(a, b) for a, b in zip(encoders, method.backbone.conditioner.parameters()))


def test_a_step_trains_the_adapters(tiny):
    """LoRA over a frozen base, with activation checkpointing: as the recipes for one GPU."""
    torch.manual_seed(0)
    method = tiny.method('CDM', student_every=1, lora=dict(rank=2), activation_checkpointing=True).train()
    method.seed, method.iteration = 5, 0
    base = {n: p.clone() for n, p in method.base.named_parameters() if '.lora_' not in n}
    optimizers = recording_optimizers(method, lr=0.01)
    logs = method.train_step(dict(prompt=PROMPTS), optimizers)
    assert logs['loss_fake'] > 0 and all(torch.as_tensor(v).isfinite().all() for v in logs.values())
    for role in ('student', 'fake'):
        for (name, _), gradient in zip(getattr(method, role).named_parameters(), optimizers[role].gradients):
            if 'lora_B' in name:
                idle = re.search(IDLE.get(tiny.name, '$^'), name.replace('-', '.'))
                assert (gradient is not None and gradient.abs().max() > 0) != bool(idle), name
    assert all(torch.equal(base[n], p) for n, p in method.base.named_parameters() if n in base)


# Compilation


def compiled_and_plain(**kwargs):
    torch._dynamo.reset()
    torch.manual_seed(0)
    plain, compiled = (MODELS.build(dict(type='FlowMatching', **dict(
        kwargs, backbone=dict(kwargs['backbone'], compile=value)))) for value in (False, True))
    compiled.student.load_state_dict(plain.student.state_dict())  # compiled blocks keep their names
    return plain, compiled


@pytest.mark.slow
def test_blocks_compile_whole_and_compute_the_same(tiny, monkeypatch):
    """Traced and differentiated as with inductor, and run eagerly: inductor needs a minute for these two blocks."""
    if tiny.name == 'flux2':
        pytest.skip("its network is klein's")
    compile_module = nn.Module.compile
    monkeypatch.setattr(nn.Module, 'compile',
                        lambda module, **kwargs: compile_module(module, **{**kwargs, 'backend': 'aot_eager'}))
    backbone = dict(type=tiny.backbone.__name__, pretrained=tiny.folder)
    methods = compiled_and_plain(backbone=backbone, image_size=tiny.size)
    counters = torch._dynamo.utils.counters
    counters.clear()
    condition = methods[0].backbone.condition(dict(prompt=PROMPTS))
    sigma, noise, velocities, gradients = torch.tensor([0.9, 0.3]), tiny.noise(), [], []
    for method in methods:
        velocities.append(method.velocity('student', noise, sigma, condition))
        velocities[-1].square().mean().backward()
        # What has no part in the result has no gradient or, compiled, one of zeros.
        gradients.append(torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten()
                                    for p in method.student.parameters()]))
    graphs = 1 if tiny.name == 'krea2' else BLOCKS[tiny.name]  # its blocks are alike
    assert counters['stats']['unique_graphs'] == graphs and not counters['graph_break']
    assert torch.allclose(*velocities, rtol=0, atol=1e-5)
    assert torch.allclose(*gradients, rtol=0, atol=1e-5) and gradients[0].abs().max() > 1e-4


@pytest.mark.slow
@pytest.mark.skipif(shutil.which('g++') is None, reason='inductor needs g++')
def test_a_block_compiles_with_inductor():
    config = dict(in_channels=16, num_layers=0, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
                  joint_attention_dim=8, axes_dims_rope=[2, 2, 4])
    methods = compiled_and_plain(image_size=16, backbone=dict(
        type='LongCatImageBackbone', config=config, codec=dict(type='PixelCodec', scale=2),
        conditioner=dict(type='ClassConditioner', num_classes=3)))
    condition = methods[0].backbone.condition(dict(prompt=[0, 2]))
    noise = torch.randn(methods[0].latent_shape(2))
    with torch.no_grad():
        velocities = [m.velocity('student', noise, torch.tensor([0.9, 0.3]), condition) for m in methods]
    assert torch.allclose(*velocities, rtol=0, atol=1e-5) and velocities[0].abs().max() > 1e-2


@pytest.mark.parametrize('name', ['klein', 'krea2'])
def test_features_of_one_stream_are_the_images(name, tinies):
    """Its last block has text and image in one, as the first of klein's has not."""
    method = tinies(name).method(type='DMD2', losses=dict(gan=dict(type='GANLoss', width=16, blocks=[1])))
    x, sigma = tinies(name).noise(), torch.full((2,), 0.5)
    maps, patch, condition = [], method.backbone.patch, method.backbone.condition(dict(prompt=PROMPTS))
    moved = x.clone()
    moved[:, :, patch, -1] += 3
    with torch.no_grad():
        for each in (x, moved):
            maps += method.features('fake', each, sigma, condition, sigma, [1])[1]
    change = (maps[1] - maps[0]).norm(dim=1)[0]
    assert change.argmax() == 2 * change.shape[1] - 1  # the second row, the last column


def test_a_gan_on_the_features_of_a_block(tiny):
    """Maps are the image's tokens, where they lie: a pixel of the input moves most the token that covers it. Pictures
    and the student's samples then train every role."""
    method = tiny.method(type='DMD2', student_every=1, losses=dict(gan=dict(type='GANLoss', width=16)))
    side = method.latent_sizes[0][0]
    x = torch.randn(method.latent_shape(2), generator=torch.Generator().manual_seed(0))
    condition = method.backbone.condition(dict(prompt=PROMPTS))
    sigma, patch, rows = torch.full((2,), 0.5), method.backbone.patch, side // method.backbone.patch

    @torch.no_grad()
    def maps(x):  # of the first and the last block, which may be of two kinds
        wanted = sorted({0, len(method.backbone.blocks(method.fake)) - 1})
        found = method.features('fake', x, sigma, condition, sigma, wanted)[1]
        assert [f.shape for f in found] == len(wanted) * [(2, method.backbone.width, rows, x.shape[-1] // patch)]
        return found

    before = maps(x)
    for row, column in ((0, rows - 1), (rows - 1, 0)):
        moved = x.clone()
        moved[:, :, row * patch, column * patch] += 3
        for one, other in zip(maps(moved), before):
            change = (one - other).norm(dim=1)[0]
            assert change.argmax() == row * change.shape[1] + column
    optimizers = recording_optimizers(method, lr=1e-3)
    scale = method.backbone.codec.scale
    method.seed, method.iteration = 5, 0
    image = torch.rand(2, 3, scale * side, scale * side) * 2 - 1
    method.train().train_step(dict(prompt=PROMPTS, image=image), optimizers)
    for role in ('student', 'fake', 'discriminator'):
        assert sum(float(g.abs().sum()) for g in optimizers[role].gradients if g is not None) > 0, role
