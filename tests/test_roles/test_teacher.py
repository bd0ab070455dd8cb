"""A teacher of its own: fine-tuned, with a LoRA file, or of another size."""
import json
import shutil

import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from mmengine.registry import MODELS
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from tests_support import recording_optimizers
from tiny_pipelines import perturbed, save_tiny_sd3

from cdm_plugin.roles.lora import AdapterRole

TARGETS = ['to_q', 'to_k', 'to_v', 'to_out.0']


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A tiny SD3, a fine-tuned one, a larger one, and a LoRA file of rank 2 and alpha 6 in three spellings."""
    root = tmp_path_factory.mktemp('teacher')
    pipeline = save_tiny_sd3(root / 'base')
    shutil.copytree(root / 'base', root / 'tuned')
    perturbed(pipeline.transformer).save_pretrained(root / 'tuned' / 'transformer')
    torch.manual_seed(3)
    config = dict(SD3Transformer2DModel.load_config(root / 'base' / 'transformer'), num_layers=3,
                  num_attention_heads=3, caption_projection_dim=24)
    (root / 'large').mkdir()
    perturbed(SD3Transformer2DModel.from_config(config)).save_pretrained(root / 'large' / 'transformer')
    network = SD3Transformer2DModel.from_pretrained(root / 'base', subfolder='transformer')
    network.add_adapter(LoraConfig(r=2, lora_alpha=6, init_lora_weights=False, target_modules=TARGETS), 'default')
    weights = {k: v.contiguous() for k, v in get_peft_model_state_dict(network, adapter_name='default').items()}
    metadata = {'lora_adapter_metadata': json.dumps({'transformer.lora_alpha': 6, 'transformer.r': 2,
                                                     'transformer.target_modules': TARGETS})}
    for name, prefix, extra in (('diffusers', 'transformer.', {}), ('peft', 'base_model.model.', {}), (
            'alphas', 'transformer.', {k.replace('.lora_A.weight', '.alpha'): torch.tensor(6.0)
                                       for k in weights if 'lora_A' in k})):
        (root / name).mkdir()
        save_file({prefix + k: v for k, v in {**weights, **extra}.items()},
                  root / name / 'pytorch_lora_weights.safetensors', metadata if name == 'diffusers' else None)
    return root


def build(folder, teacher, type='CDM', **kwargs):
    torch.manual_seed(0)
    method = MODELS.build(dict(type=type, backbone=dict(type='SD3Backbone', pretrained=str(folder / 'base')),
                               image_size=16, student_every=1, teacher=teacher, **kwargs))
    method.seed, method.iteration = 0, 0
    return method.train()


def velocities(method, *roles):
    generator = torch.Generator().manual_seed(1)
    x, sigma = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([0.9, 0.4])
    condition = method.backbone.condition(dict(prompt=['a fox', 'birds']))
    with torch.no_grad():
        return [method.velocity(role, x, sigma, condition) for role in roles]


def diffusers_velocity(method, folder, name=None, scale=1.0, network='base'):
    """Of diffusers' pipeline with the LoRA file as `load_lora_weights` takes it."""
    if name is None:
        transformer = SD3Transformer2DModel.from_pretrained(folder / network, subfolder='transformer')
    else:
        pipeline = StableDiffusion3Pipeline.from_pretrained(folder / 'base')
        pipeline.load_lora_weights(str(folder / name))
        pipeline.set_adapters(pipeline.get_active_adapters(), [scale])
        transformer = pipeline.transformer
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    fields = method.backbone.condition(dict(prompt=['a fox', 'birds'])).fields
    with torch.no_grad():
        return transformer(x, timestep=torch.tensor([900.0, 400.0]), return_dict=False, **fields)[0]


def close(a, b):
    return torch.allclose(a, b, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize('lora', [None, dict(rank=4, target_modules=TARGETS)], ids=['full', 'adapters'])
@pytest.mark.parametrize('scale', [1.0, 0.5])
@pytest.mark.parametrize('name', ['diffusers', 'alphas', 'peft'])
def test_a_lora_file_on_the_base(name, scale, lora, folder):
    """The PEFT file has no alpha: alpha is the rank then, which is a third of the other files' strength."""
    method = build(folder, dict(lora=str(folder / name), lora_scale=scale), lora=lora)
    teacher, student, fake = velocities(method, 'teacher', 'student', 'fake')
    expected = diffusers_velocity(method, folder, 'diffusers', scale / 3 if name == 'peft' else scale)
    plain = diffusers_velocity(method, folder)
    assert close(teacher, expected) and not close(teacher, plain)
    assert close(student, teacher) and close(fake, teacher)  # init='teacher'
    base = build(folder, dict(lora=str(folder / name), init='base'), lora=lora)
    assert all(close(v, plain) for v in velocities(base, 'student', 'fake'))


@pytest.mark.parametrize('settings', [
    dict(use_rslora=True), dict(rank_pattern={'to_q': 3}, alpha_pattern={'to_k': 1.0, '0.attn.to_v': 9.0}),
    dict(use_rslora=True, alpha_pattern={'to_out.0': 2.0})], ids=['rslora', 'patterns', 'both'])
def test_scales_of_other_kinds_of_lora_files(settings, folder, tmp_path):
    """As diffusers itself reads them."""
    network = SD3Transformer2DModel.from_pretrained(folder / 'base', subfolder='transformer')
    torch.manual_seed(4)
    network.add_adapter(LoraConfig(r=2, lora_alpha=6, init_lora_weights=False, target_modules=TARGETS, **settings))
    (tmp_path / 'base').symlink_to(folder / 'base')
    StableDiffusion3Pipeline.save_lora_weights(
        tmp_path / 'file', transformer_lora_layers=get_peft_model_state_dict(network),
        transformer_lora_adapter_metadata={k: sorted(v) if isinstance(v, set) else v
                                           for k, v in network.peft_config['default'].to_dict().items()})
    method = build(folder, dict(lora=str(tmp_path / 'file')))
    (teacher,) = velocities(method, 'teacher')
    assert close(teacher, diffusers_velocity(method, tmp_path, 'file'))
    assert not close(teacher, diffusers_velocity(method, tmp_path, 'file', 0.8))


def test_with_adapters_it_still_is_one_copy_of_the_base(folder):
    method = build(folder, dict(lora=str(folder / 'diffusers')), lora=dict(rank=4, target_modules=TARGETS))
    alone = SD3Transformer2DModel.from_pretrained(folder / 'base', subfolder='transformer')
    adapters = sum(p.numel() for role in ('student', 'fake', 'teacher') for p in getattr(method, role).parameters())
    networks = sum(p.numel() for n, p in method.named_parameters() if not n.startswith('backbone.'))
    assert isinstance(method.teacher, AdapterRole) and networks == sum(p.numel() for p in alone.parameters()) + adapters
    before = {k: v.clone() for k, v in method.teacher.state_dict().items()}
    optimizers = recording_optimizers(method)
    method.train_step(dict(prompt=['a fox', 'birds']), optimizers)
    assert all(p.grad is None for p in (*method.teacher.parameters(), *(
        p for n, p in method.base.named_parameters() if 'lora_' not in n)))
    for role in ('student', 'fake'):
        assert sum(g.abs().sum() for g in optimizers[role].gradients if g is not None) > 0
    for key, value in method.teacher.state_dict().items():
        assert torch.equal(value, before[key])
    assert not any(key.startswith('teacher.') for key in method.state_dict())


def test_adapters_too_small_for_the_teachers_start_from_the_base(folder):
    method = build(folder, dict(lora=str(folder / 'diffusers')), lora=dict(rank=1, target_modules=TARGETS))
    student, teacher = velocities(method, 'student', 'teacher')
    assert close(student, diffusers_velocity(method, folder)) and not close(student, teacher)


@pytest.mark.parametrize('init', ['teacher', 'base'])
def test_a_fine_tuned_teacher(init, folder):
    method = build(folder, dict(pretrained=str(folder / 'tuned'), init=init))
    teacher, student, fake = velocities(method, 'teacher', 'student', 'fake')
    tuned, plain = (diffusers_velocity(method, folder, network=name) for name in ('tuned', 'base'))
    assert close(teacher, tuned) and not close(tuned, plain)
    assert all(close(v, tuned if init == 'teacher' else plain) for v in (student, fake))


@pytest.mark.parametrize('lora', [None, dict(rank=2)], ids=['full', 'adapters'])
def test_a_teacher_of_another_size(lora, folder):
    method = build(folder, dict(pretrained=str(folder / 'large')), lora=lora, losses=dict(cdm=dict(guided=True)))
    teacher, student = velocities(method, 'teacher', 'student')
    assert close(teacher, diffusers_velocity(method, folder, network='large'))
    assert close(student, diffusers_velocity(method, folder))
    optimizers = recording_optimizers(method)
    method.train_step(dict(prompt=['a fox', 'birds']), optimizers)
    assert sum(float(g.abs().sum()) for g in optimizers['student'].gradients if g is not None) > 0
    condition = method.backbone.condition(dict(prompt=['a fox', 'birds']))
    assert method.sample(condition, role='teacher', guidance_scale=3.0).shape == (2, 3, 16, 16)


@pytest.mark.parametrize('teacher, message', [
    (dict(lore='x'), "model.teacher.lore is unknown: .*did you mean 'lora'"),
    (dict(init='student'), "model.teacher.init must be 'teacher' or 'base', but is 'student'"),
    (dict(lora_scale='strong'), "model.teacher.lora_scale must be a number, but is 'strong'"),
    (dict(pretrained='./absent'), "model.teacher.pretrained='./absent' is no folder"),
    (dict(lora='./absent'), "model.teacher.lora='./absent' is no LoRA file"),
    (dict(config=dict(SD3=1)), 'unknown keys')])
def test_mistakes_are_named(teacher, message, folder):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        build(folder, teacher)


def test_a_teacher_with_other_latents_is_refused(folder, tmp_path):
    config = dict(SD3Transformer2DModel.load_config(folder / 'base' / 'transformer'), in_channels=8, out_channels=8)
    SD3Transformer2DModel.from_config(config).save_pretrained(tmp_path / 'transformer')
    with pytest.raises(ValueError, match='model.teacher has latents of width 8, but the student .* 4'):
        build(folder, dict(pretrained=str(tmp_path)))


def test_a_lora_file_of_another_architecture_is_refused(folder, tmp_path):
    save_file({'transformer.other.lora_A.weight': torch.zeros(2, 4),
               'transformer.other.lora_B.weight': torch.zeros(4, 2)}, tmp_path / 'pytorch_lora_weights.safetensors')
    with pytest.raises(ValueError, match='adapts layers that SD3Transformer2DModel lacks, for example .*other'):
        build(folder, dict(lora=str(tmp_path)))
