import copy
import functools

import pytest
import torch
from diffusers import SD3Transformer2DModel
from mmengine.registry import MODELS
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tests_support import perturb, recording_optimizers, tiny_backbone, tiny_method

from cdm_plugin.engine import StudentEMA
from cdm_plugin.roles.anchor_aware import make_anchor_aware
from cdm_plugin.roles.lora import AdapterRole, checkpoint_in_role, read_lora, save_lora, tuner_layers
from cdm_plugin.roles.weights import merge_weights

LABELS = dict(prompt=torch.tensor([0, 1, 2, 1, 0]))
RANK = dict(rank=3, alpha=6)


def lora_method(type='CDM', dtype=torch.float64, seed=0, **kwargs):
    """A method whose base and adapters all matter, ready for train_step in an iteration with a student step."""
    torch.manual_seed(seed)
    method = MODELS.build(dict(type=type, backbone=tiny_backbone(), lora={**RANK, **kwargs.pop('lora', {})}, **kwargs))
    perturb(method.base)  # adapters too
    method = method.to(dtype).train()
    method.seed, method.iteration = 5, method.student_every - 1
    return method


def as_networks(method):
    """The three-copy reference: every role a copy of the base, adapted by PEFT in the plain way."""
    roles = {}
    for role in ('student', 'fake', 'teacher'):
        network = SD3Transformer2DModel.from_config(method.base.config).to(method.math_dtype)
        own = {k.replace('.base_layer', ''): v for k, v in method.base.state_dict().items() if '.lora_' not in k}
        network.load_state_dict({k: v for k, v in own.items() if 'anchor_embedding' not in k})
        network.requires_grad_(False)
        if role != 'teacher':
            targets = list(method.base.peft_config[role].target_modules)
            network.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=targets))
            network.to(method.math_dtype)
            state = get_peft_model_state_dict(method.base, adapter_name=role)
            own = {k.replace('.weight', '.default.weight'): v for k, v in state.items()}
            missing, extra = network.load_state_dict(own, strict=False)
            assert not extra and not any('lora' in k for k in missing)
        roles[role] = network
    return roles


def three_copies(method):
    """A copy of a method with three separate networks behind its roles."""
    reference, networks = copy.deepcopy(method), as_networks(method)
    reference.base, reference.lora = None, None
    for role in ('student', 'fake', 'teacher'):
        setattr(reference, role, networks[role])
    if hasattr(method.fake, 'anchor_embedding'):
        make_anchor_aware(reference.fake, reference.backbone.time_embedder, reference.backbone.time_embedding_width())
        reference.fake.anchor_embedding.load_state_dict(method.fake.anchor_embedding.state_dict())
    return reference


def gradients(method):
    """Gradients of one iteration by role and adapter layer."""
    wrappers = recording_optimizers(method)
    logs = method.train_step(copy.deepcopy(LABELS), wrappers)
    found = {}
    for role in ('student', 'fake'):
        parameters = [p for group in wrappers[role].optimizer.param_groups for p in group['params']]
        names = {id(p): name for name, p in getattr(method, role).named_parameters()}
        for parameter, gradient in zip(parameters, wrappers[role].gradients):
            name = names[id(parameter)].removeprefix('adapters.').replace('-', '.').replace('.default', '')
            if gradient is not None:
                found[role, name] = gradient
    return found, logs


@pytest.mark.parametrize('aware', [False, True])
@pytest.mark.parametrize('checkpointing', [False, True])
@pytest.mark.parametrize('type', ['CDM', 'DecoupledDMD', 'DMD2'])
def test_gradients_equal_three_separate_networks_with_the_same_adapters(type, checkpointing, aware):
    method = lora_method(type, activation_checkpointing=checkpointing, anchor_aware_fake=aware)
    if aware:
        perturb(method.fake.anchor_embedding)
    reference = three_copies(method)
    found, logs = gradients(method)
    expected, expected_logs = gradients(reference)
    assert found.keys() == expected.keys() and len(found) > 20
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=0, atol=1e-10)
    assert any(gradient.abs().max() > 1e-6 for gradient in expected.values())
    for name in ('loss_fake', 'loss_student'):
        torch.testing.assert_close(logs[name], expected_logs[name], rtol=0, atol=1e-10)


def test_a_second_backward_pass_through_the_same_checkpoint():
    method = lora_method(activation_checkpointing=True)
    condition = method.backbone.condition(LABELS)
    loss = method.velocity('student', torch.randn(5, 4, 4, 4), torch.rand(5), condition).square().mean()
    parameters = list(method.student.parameters())
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(loss, parameters)))


def call_by_name(block, *args):
    """As Wan-Animate checkpoints: the last argument by its name."""
    return checkpoint_in_role(lambda *rest, temb: block(*rest, temb), *args[:-1], temb=args[-1])


# What diffusers' networks hand over to be checkpointed, in one version or another.
HANDED_OVER = {
    'block': checkpoint_in_role,
    'bound method': lambda block, *args: checkpoint_in_role(block.forward, *args),
    'bound __call__': lambda block, *args: checkpoint_in_role(block.__call__, *args),
    'partial': lambda block, *args: checkpoint_in_role(functools.partial(block, *args[:1]), *args[1:]),
    'closure': lambda block, *args: checkpoint_in_role(lambda *inner: block(*inner), *args),
    'function of blocks': lambda block, *args: checkpoint_in_role(lambda one, *inner: one(*inner), block, *args),
    'by name': call_by_name,
    'nested': lambda block, *args: checkpoint_in_role(lambda *inner: checkpoint_in_role(block, *inner), *args),
}


@pytest.mark.parametrize('handed_over', HANDED_OVER)
def test_checkpointing_changes_no_gradient_whatever_the_network_hands_over(handed_over):
    plain, checkpointed = lora_method(), lora_method(activation_checkpointing=True)
    calls = []

    def checkpoint(*args):
        calls.append(args)
        return HANDED_OVER[handed_over](*args)

    checkpointed.base.enable_gradient_checkpointing(gradient_checkpointing_func=checkpoint)
    expected, found = gradients(plain)[0], gradients(checkpointed)[0]
    assert calls and found.keys() == expected.keys() and len(found) > 20
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=0, atol=1e-14)
    for role in ('student', 'fake'):
        assert max(g.abs().max() for (r, _), g in expected.items() if r == role) > 1e-6


@pytest.mark.parametrize('handed_over', HANDED_OVER)
def test_checkpointing_outside_of_a_role_is_an_error(handed_over):
    method = lora_method()
    method.base.enable_gradient_checkpointing(gradient_checkpointing_func=HANDED_OVER[handed_over])
    with pytest.raises(RuntimeError, match='outside of a role: call the AdapterRole instead of its base'):
        method.backbone.velocity(method.base, torch.randn(5, 4, 4, 4), torch.rand(5), method.backbone.condition(LABELS))
    with pytest.raises(RuntimeError, match='outside of a role'):  # nothing tells which network this belongs to
        checkpoint_in_role(torch.sin, torch.ones(1, requires_grad=True))
    layer, x = torch.nn.Linear(2, 2), torch.ones(1, 2)
    assert torch.equal(checkpoint_in_role(layer, x), layer(x))  # and this has no adapters


def test_layers_are_searched_for_once_and_again_after_a_new_adapter(monkeypatch):
    method, walks = lora_method(), []
    base, modules = method.base, type(method.base).modules
    monkeypatch.setattr(type(base), 'modules', lambda self: walks.append(self) or modules(self))
    condition = method.backbone.condition(LABELS)
    x, sigma = torch.randn(5, 4, 4, 4, dtype=torch.float64), torch.rand(5, dtype=torch.float64)

    def answers():
        return torch.stack([method.velocity(role, x, sigma, condition).detach()
                            for role in ('student', 'fake', 'teacher')])

    before = answers()
    answers()
    assert walks == []  # adding the fake score's adapter has searched already
    known = set(tuner_layers(base))
    # Anybody may add an adapter, and to other layers.
    base.add_adapter(LoraConfig(r=2, target_modules=['proj_out'], init_lora_weights=False), adapter_name='other')
    method.double()
    torch.testing.assert_close(answers(), before, rtol=0, atol=1e-14)  # no role computes with the other adapter
    assert len(walks) > 0 and set(tuner_layers(base)) == known | {base.proj_out}
    walks.clear()
    torch.testing.assert_close(answers(), before, rtol=0, atol=1e-14)
    assert walks == []
    assert base.proj_out._active_adapter == ['other'] and not base.proj_out._disable_adapters
    copied = copy.deepcopy(method)
    assert not set(tuner_layers(copied.base)) & set(tuner_layers(base))
    assert len(tuner_layers(copied.base)) == len(tuner_layers(base))


@pytest.mark.parametrize('checkpointing', [False, True])
def test_each_adapter_moves_in_its_own_step_only_and_the_base_never(checkpointing):
    method = lora_method(activation_checkpointing=checkpointing, fake_merge=0.0)
    method.iteration = 0  # no student step
    before = {name: p.clone() for name, p in method.named_parameters()}
    wrappers = recording_optimizers(method)
    method.train_step(LABELS, wrappers)

    def moved():
        names = [name for name, p in method.named_parameters() if not torch.equal(p, before[name])]
        return {'student' if '.student.' in n else 'fake' if '.fake.' in n else n for n in names}

    assert moved() == {'fake'}
    assert all(p.grad is None for name, p in method.base.named_parameters() if 'lora_' not in name)
    before = {name: p.clone() for name, p in method.named_parameters()}
    method.iteration = 1
    method.train_step(LABELS, wrappers)
    assert moved() == {'fake', 'student'}
    assert all(p.grad is None for name, p in method.base.named_parameters() if 'lora_' not in name)


def test_the_teacher_is_the_base_and_roles_start_as_the_teacher(labels):
    torch.manual_seed(0)
    method = MODELS.build(dict(type='CDM', backbone=tiny_backbone(), lora=RANK))
    with torch.no_grad():
        for name, parameter in method.base.named_parameters():
            if 'lora_' not in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    condition = method.backbone.condition(labels)
    x, sigma = torch.randn(5, 4, 4, 4), torch.rand(5)
    plain = SD3Transformer2DModel.from_config(method.base.config)
    plain.load_state_dict({k.replace('.base_layer', ''): v for k, v in method.base.state_dict().items()
                           if 'lora_' not in k})
    expected = method.backbone.velocity(plain, x, sigma, condition)
    for role in ('teacher', 'student', 'fake'):
        torch.testing.assert_close(method.velocity(role, x, sigma, condition), expected, rtol=0, atol=1e-6)
    assert list(method.teacher.parameters()) == []
    assert len({id(r.base) for r in (method.student, method.fake, method.teacher)}) == 1


def test_fake_merge_and_ema_act_on_adapters_only():
    method = lora_method()
    student, fake = ({n: p.clone() for n, p in network.named_parameters()} for network in (method.student, method.fake))
    base = {n: p.clone() for n, p in method.base.named_parameters() if 'lora_' not in n}
    merge_weights(method.fake, method.student, 0.25)
    for name, parameter in method.fake.named_parameters():
        torch.testing.assert_close(parameter, 0.75 * fake[name] + 0.25 * student[name], rtol=0, atol=1e-12)
    ema = StudentEMA(method.student)
    assert ema.weights.keys() == student.keys()
    ema.weights = {name: torch.zeros_like(w) for name, w in ema.weights.items()}
    with ema.applied():
        assert all(not p.any() for p in method.student.parameters())
    assert all(torch.equal(p, student[n]) for n, p in method.student.named_parameters())
    assert all(torch.equal(p, base[n]) for n, p in method.base.named_parameters() if n in base)


def test_checkpoints_hold_adapters_only_and_load_back():
    method, other = lora_method(anchor_aware_fake=True), lora_method(anchor_aware_fake=True, seed=1)
    state = method.state_dict()
    assert all(key.startswith(('student.adapters.', 'fake.adapters.', 'fake.anchor_embedding.')) for key in state)
    other.load_state_dict(state)
    for role in ('student', 'fake'):
        for (name, p), q in zip(getattr(method, role).named_parameters(), getattr(other, role).parameters()):
            assert torch.equal(p, q), name


def test_copies_are_independent():
    method = lora_method(anchor_aware_fake=True)
    other = copy.deepcopy(method)
    assert other.student.base is other.base is other.fake.base
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert all(p.abs().sum() > 0 for p in method.student.parameters())


def test_lora_file_round_trip_and_start_from_it(tmp_path):
    method = lora_method(dtype=torch.float32)
    file = save_lora(method.student, str(tmp_path))
    assert file.is_file() and file.suffix == '.safetensors'
    torch.manual_seed(0)
    started = MODELS.build(dict(type='CDM', backbone=tiny_backbone(), lora=dict(RANK, student=str(tmp_path))))
    for (name, p), q in zip(method.student.named_parameters(), started.student.parameters()):
        assert torch.equal(p, q), name
    assert not any(torch.equal(p, q) for p, q in zip(method.fake.parameters(), started.fake.parameters()))


@pytest.mark.parametrize('writer', ['diffusers', 'peft'])
@pytest.mark.parametrize('settings', [
    dict(use_rslora=True), dict(alpha_pattern={'to_k': 1.0}), dict(rank_pattern={'to_k': 2})],
    ids=['rslora', 'alpha-pattern', 'rank-pattern'])
def test_a_start_of_another_kind_of_lora_file(settings, writer, tmp_path):
    """As diffusers' networks and PEFT write them: scales are read right, ranks of several sizes are refused."""
    method = MODELS.build(dict(type='CDM', backbone=tiny_backbone(), lora=RANK))
    network = SD3Transformer2DModel.from_config(method.base.config)
    config = LoraConfig(r=3, lora_alpha=6, init_lora_weights=False, **settings, target_modules=sorted({
        name.rpartition('attn.')[2] for name, m in method.base.named_modules() if hasattr(m, 'lora_A')}))
    if writer == 'diffusers':
        network.add_adapter(config)
        network.save_lora_adapter(tmp_path)
    else:
        PeftModel(network, config).save_pretrained(tmp_path)
    build = functools.partial(MODELS.build, dict(
        type='CDM', backbone=tiny_backbone(), lora=dict(RANK, student=str(tmp_path))))
    if 'rank_pattern' in settings:
        with pytest.raises(ValueError, match=r'model\.lora\.student=.*rank 2, but model\.lora\.rank is 3.*to_k'):
            build()
        return
    started = build()
    layers = {n: m for n, m in network.named_modules() if hasattr(m, 'lora_A')}
    assert len(layers) > 8
    for name, layer in layers.items():
        torch.testing.assert_close(started.base.get_submodule(name).get_delta_weight('student'),
                                   layer.get_delta_weight('default'), rtol=1e-5, atol=1e-6)
    scales = {round(layer.scaling['default'], 4) for layer in layers.values()}
    assert scales == ({3.4641} if 'use_rslora' in settings else {2.0, 0.3333})


def test_a_lora_file_has_its_strength_in_its_weights(tmp_path):
    """For readers that know no metadata. ComfyUI's model_lora_keys_unet takes `transformer.` and diffusers' name of a
    layer for SD3, Flux, Qwen-Image and Z-Image, and a scale of alpha / rank from `<layer>.alpha` alone, or 1."""
    method = lora_method(dtype=torch.float32)  # rank 3, alpha 6
    weights = load_file(save_lora(method.student, str(tmp_path)))
    layers = {name.removeprefix('transformer.').rpartition('.lora_')[0] for name in weights}
    assert weights.keys() == {f'transformer.{layer}.lora_{part}.weight' for layer in layers for part in 'AB'}
    for layer in layers:
        module = method.base.get_submodule(layer)
        delta = weights[f'transformer.{layer}.lora_B.weight'] @ weights[f'transformer.{layer}.lora_A.weight']
        torch.testing.assert_close(delta, module.get_delta_weight('student'), rtol=0, atol=1e-7)


def test_a_role_of_another_alpha_starts_as_the_same_function(tmp_path):
    method = lora_method(dtype=torch.float32)
    save_lora(method.student, str(tmp_path))
    torch.manual_seed(0)
    other = MODELS.build(dict(type='CDM', backbone=tiny_backbone(), lora=dict(rank=3, alpha=1.5,
                                                                             student=str(tmp_path))))
    for name, module in method.base.named_modules():
        if hasattr(module, 'lora_A'):
            started = other.base.get_submodule(name).get_delta_weight('student')
            torch.testing.assert_close(started, module.get_delta_weight('student'), rtol=0, atol=1e-7)


def test_diffusers_opens_the_lora_file(tmp_path):
    method = lora_method(dtype=torch.float32)
    save_lora(method.student, str(tmp_path))
    network = SD3Transformer2DModel.from_config(method.base.config)
    network.load_state_dict({k.replace('.base_layer', ''): v for k, v in method.base.state_dict().items()
                             if 'lora_' not in k})
    network.load_lora_adapter(str(tmp_path), prefix='transformer', use_safetensors=True)
    condition = method.backbone.condition(LABELS)
    x, sigma = torch.randn(5, 4, 4, 4), torch.rand(5)
    expected = method.velocity('student', x, sigma, condition)
    torch.testing.assert_close(method.backbone.velocity(network, x, sigma, condition), expected, rtol=0, atol=1e-5)
    assert (expected - method.velocity('teacher', x, sigma, condition)).abs().max() > 1e-3


def test_mistakes_name_the_key(tmp_path):
    def build(**lora):
        return MODELS.build(dict(type='CDM', backbone=tiny_backbone(), lora=lora))

    save_lora(lora_method(dtype=torch.float32).student, str(tmp_path / 'rank3'))
    with pytest.raises(ValueError, match=r"model\.lora\.ranks is unknown.*did you mean 'rank'"):
        build(ranks=3)
    with pytest.raises(ValueError, match=r'model\.lora\.rank must be'):
        build(rank=0)
    for alpha in (0, 'abc'):
        with pytest.raises(ValueError, match=r'model\.lora\.alpha must be a number above 0'):
            build(alpha=alpha)
    with pytest.raises(ValueError, match=r'model\.lora\.target_modules.*nothing'):
        build(rank=2, target_modules=['nothing'])
    with pytest.raises(ValueError, match=r'model\.lora\.student=.*rank 3, but model\.lora\.rank is 4'):
        build(rank=4, alpha=6, student=str(tmp_path / 'rank3'))
    dora = dict(load_file(tmp_path / 'rank3/pytorch_lora_weights.safetensors'), **{'a.dora_scale': torch.ones(1)})
    save_file(dora, tmp_path / 'dora.safetensors')
    with pytest.raises(ValueError, match='is a DoRA'):
        build(rank=3, alpha=6, student=str(tmp_path / 'dora.safetensors'))
    save_file({'lora_unet_x.lora_down.weight': torch.ones(1)}, tmp_path / 'kohya.safetensors')
    with pytest.raises(ValueError, match='no keys of diffusers or PEFT.*lora_unet_x.lora_down.weight'):
        build(rank=3, student=str(tmp_path / 'kohya.safetensors'))
    with pytest.raises(ValueError, match=r'other layers than model\.lora\.target_modules'):
        build(rank=3, alpha=6, student=str(tmp_path / 'rank3'), target_modules=['to_q'])
    with pytest.raises(FileNotFoundError, match=r'model\.lora\.fake='):
        build(rank=3, fake=str(tmp_path / 'absent'))
    (tmp_path / 'cut.safetensors').write_bytes((tmp_path / 'rank3/pytorch_lora_weights.safetensors').read_bytes()[:99])
    with pytest.raises(ValueError, match='truncated'):
        read_lora(str(tmp_path / 'cut.safetensors'), 'model.lora.student')
    with pytest.raises(ValueError, match=r'model\.teacher_dtype.*model\.lora'):
        MODELS.build(dict(type='CDM', backbone=tiny_backbone(), lora=RANK, teacher_dtype='bfloat16'))
    with pytest.raises(ValueError, match=r'model\.backbone\.quantization needs model\.lora'):
        MODELS.build(dict(type='CDM', backbone=tiny_backbone(quantization=dict(load_in_4bit=True))))


def test_bfloat16_base_keeps_float32_adapters():
    method = MODELS.build(dict(type='CDM', backbone=tiny_backbone(dtype='bfloat16'), lora=RANK))
    assert {p.dtype for p in method.student.parameters()} == {torch.float32}
    assert method.teacher.dtype == torch.bfloat16 and method.math_dtype == torch.float32
    method.seed, method.iteration = 5, 1
    logs = method.train_step(LABELS, recording_optimizers(method))
    assert torch.isfinite(logs['loss_student'])


def test_separate_networks_have_no_base():
    method = tiny_method()
    assert method.base is None and not isinstance(method.student, AdapterRole)
    built = MODELS.build(dict(type='CDM', backbone=tiny_backbone(), teacher_dtype='bfloat16'))
    assert built.teacher.dtype == torch.bfloat16 and built.student.dtype == torch.float32
