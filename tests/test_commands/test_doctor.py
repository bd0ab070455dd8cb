"""What `cdm doctor` says, against models that are really built, draws that are really drawn and iterations that run."""
import math
import re
import shutil
import types
from collections import Counter

import pytest
import torch
import transformers
from diffusers import SD3Transformer2DModel
from mmengine.config import Config
from mmengine.registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS
from recipes import (
    CDM,
    FLUX_LORA,
    LONGCAT,
    LONGCAT_LORA,
    SD3,
    SD3_LORA,
    nothing_loads,
    recipe_params,
    report_of,
    shipped,
)
from tests_support import TINY_SD3, recording_optimizers, tiny_backbone, tiny_method
from tiny_pipelines import save_tiny_bert, save_tiny_flux, save_tiny_longcat, save_tiny_sd3
from torch import nn

from cdm_plugin.commands.doctor import diagnosis, footprint
from cdm_plugin.commands.doctor.calls import ask, expected_calls, grid_lengths
from cdm_plugin.commands.doctor.diagnosis import diagnose
from cdm_plugin.commands.doctor.footprint import measure
from cdm_plugin.commands.doctor.meta import build_on_meta
from cdm_plugin.commands.doctor.report import Report, format_report
from cdm_plugin.config import RECIPES, load_config, read_config
from cdm_plugin.engine import StudentEMA
from cdm_plugin.time_grids import DynamicTimeGrid, FixedTimeGrid

GIB = 2**30


def config(model=None, optimizer=None, batch=4, hooks=({'type': 'CDMHook'},), **keys):
    """A training config of the tiny SD3."""
    wrapper = dict(optimizer=optimizer or dict(type='AdamW', lr=1e-3))
    return Config(dict(
        model=dict(type='CDM', backbone=tiny_backbone(), **(model or {})),
        train_dataloader=dict(batch_size=batch, dataset=dict(type='LabelDataset', num_classes=3)),
        optim_wrapper=dict(constructor='DistillationOptimWrapperConstructor', student=dict(wrapper),
                           fake=dict(wrapper)),
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=10), custom_hooks=list(hooks), **keys))


# Shipped recipes


@pytest.mark.parametrize('recipe', recipe_params(name for name in shipped() if not name.startswith('emoji/')))
def test_every_shipped_recipe_is_examined_without_loading_anything(recipe):
    report, large = report_of(recipe), not recipe.startswith('digits/')
    # The prompts are the user's, and so are the LoRA file of a style and the pictures of a GAN.
    own = ["ann_file='captions.jsonl' does not exist", "data_root='data' does not exist"] if '-gan_' in recipe else [
        "ann_file='data/prompts.txt' does not exist"]
    assert sorted(report.problems) == (
        ["model.teacher.lora='data/style.safetensors' does not exist"] * ('-style_' in recipe)
        + [f'train_dataloader.dataset: {problem}' for problem in own if large])
    said = [w for w in report.warnings if 'is not in the cache' not in w and 'no CUDA device' not in w]
    assert said == ['what the losses of discriminator add while they run is not estimated'] * ('-gan_' in recipe)
    assert report.resident > 0 and report.peak > report.resident and report.calls.equivalents > 0
    text = format_report(report)
    for part in ('versions', 'recipe', 'memory of one GPU', 'network calls', report.recipe['method']):
        assert part in text
    assert max(map(len, text.splitlines())) < 240


LARGE = [name for name in shipped() if not name.startswith(('digits/', 'emoji/'))]


def stated_memory(recipe):
    """GiB of a GPU, and of the CPU's memory if any, in a recipe's head."""
    text = (RECIPES / recipe).read_text()
    (gpu,) = re.findall(r'^# About (\d+) GiB', text, re.M)
    return int(gpu), list(map(int, re.findall(r"(\d+) GiB of the CPU's memory", text)))


@pytest.mark.parametrize('recipe', LARGE)
def test_the_head_of_a_recipe_is_short_and_states_a_memory(recipe):
    text = (RECIPES / recipe).read_text()
    gpu, cpu = stated_memory(recipe)
    assert gpu > 0 and (len(cpu) == 1) == ('-offload' in recipe)
    assert 'estimated by `cdm doctor`, not run' in text
    assert len(text.splitlines()) < 25


@pytest.mark.parametrize('recipe', recipe_params(LARGE))
def test_the_stated_memory_is_the_estimated_one(recipe):
    (gpu, cpu), report = stated_memory(recipe), report_of(recipe)
    assert report.needed / 2**30 == pytest.approx(gpu, rel=0.03)
    assert [report.own_memory.cpu / 2**30] * bool(report.own_memory.cpu) == pytest.approx(cpu, rel=0.03)


def test_recipes_of_the_emoji_bench_say_what_is_to_be_made_first(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    teacher, student = (report_of(f'emoji/{name}.py') for name in (
        'teacher_flow-matching_sd3-emoji_1xb128_20k', 'cdm_sd3-emoji_1xb64_4step_4k'))
    assert any('data/emoji/embeddings does not exist' in problem for problem in teacher.problems)
    assert teacher.recipe['image'].startswith('64x64 pixels, 256 tokens')
    assert any("model.backbone.pretrained='work_dirs/emoji/teacher' is no folder" in problem
               for problem in student.problems)
    for report in (teacher, student):
        assert any("ann_file='train.jsonl' does not exist" in problem for problem in report.problems)


def test_a_text_encoder_of_transformers_is_counted(tmp_path):
    save_tiny_bert(tmp_path)
    cfg = config()
    cfg.model.backbone.conditioner = dict(type='TextEncoderConditioner', pretrained=str(tmp_path), max_length=9)
    report = diagnose(cfg)
    (encoders,) = [part for part in report.parts if part.name == 'text encoders']
    assert encoders.parameters == sum(
        p.numel() for p in transformers.BertModel.from_pretrained(tmp_path).parameters())
    assert report.recipe['image'].endswith('9 of text')
    cfg.model.backbone.conditioner.pretrained = './no/encoder'
    assert any('./no/encoder' in problem for problem in diagnose(cfg).problems)


@pytest.mark.parametrize('recipe', [SD3, SD3_LORA])
def test_networks_lie_on_the_meta_device(recipe):
    method = build_on_meta(read_config(recipe).model.to_dict(), Report('', 1))
    networks = [method.student, method.fake, method.teacher, method.backbone.codec] + [method.base] * bool(method.base)
    assert {p.device.type for network in networks for p in network.parameters()} == {'meta'}


def test_parameters_of_the_shipped_recipes():
    sd3, longcat = report_of(SD3), report_of(LONGCAT)
    # Published: 2.03 B; 6 B; 12 B.
    assert [sd3.part(role).parameters for role in ('student', 'fake', 'teacher')] == [2_028_328_000] * 3
    assert longcat.part('student').parameters == pytest.approx(6e9, rel=0.05)
    assert report_of(FLUX_LORA).part('base').parameters == pytest.approx(12e9, rel=0.01)
    assert report_of(SD3_LORA).part('base').parameters == 2_028_328_000
    # By hand: 8 projections of width 1536 in 24 blocks, but the last has none of the text's output; rank 64.
    assert report_of(SD3_LORA).part('student').parameters == (8 * 24 - 1) * 64 * 2 * 1536
    # By hand: 8 in the blocks of two streams, query, key and value in those of one; width 3072.
    lora = build_on_meta(read_config(LONGCAT_LORA).model.to_dict(), Report('', 1))
    assert sum(p.numel() for p in lora.fake.parameters()) == (8 * 10 + 3 * 20) * 64 * 2 * 3072


def test_memory_of_full_weights_by_hand():
    """float32 weights 4 bytes, AdamW 8, EMA 4, gradients 4; a frozen bfloat16 teacher 2."""
    report, n = report_of(SD3), 2_028_328_000
    student, fake, teacher = (report.part(role) for role in ('student', 'fake', 'teacher'))
    tables = 192 * 192 * 1536  # of positions, a buffer
    assert student.weights == fake.weights == 4 * (n + tables) and teacher.weights == 2 * (n + tables)
    assert student.gradients == fake.gradients == student.ema == 4 * n and teacher.gradients == fake.ema == 0
    assert 8 * n <= student.optimizer < 8 * n + 10_000  # and a count of steps for each tensor
    assert report.part('text encoders').weights == 2 * (123_650_304 + 694_659_840 + 4_762_310_656)
    assert report.checkpoint == pytest.approx((2 * 12 + 4) * n, rel=0.02)


def test_lora_is_one_base_and_two_adapters():
    report = report_of(SD3_LORA)
    assert report.part('base').dtype == 'bfloat16' and report.part('base').gradients == 0
    assert report.part('teacher').weights == report.part('teacher').parameters == 0
    assert report.part('text encoders').weights == 0  # offloaded
    assert report.phases['text encoding'] > 10 * GIB
    assert report.peak < report_of(SD3).peak / 4


# Bytes, against what is really built


def really_built(cfg):
    """The method and its optimizers after one step of each."""
    method = MODELS.build(cfg.model.to_dict()).train()
    wrappers = OPTIM_WRAPPER_CONSTRUCTORS.build(dict(
        type=cfg.optim_wrapper.constructor, optim_wrapper_cfg=cfg.optim_wrapper.to_dict()))(method)
    for role in method.trained_roles:
        for p in getattr(method, role).parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        wrappers[role].optimizer.step()
    return method, wrappers


def nbytes(tensors):
    return sum(t.nbytes for t in tensors)


@pytest.mark.parametrize('model, optimizer', [
    ({}, dict(type='AdamW', lr=1e-3)),
    (dict(anchor_aware_fake=True, teacher_dtype='bfloat16'), dict(type='AdamW', lr=1e-3, fused=True)),
    (dict(lora=dict(rank=3), anchor_aware_fake=True), dict(type='AdamW', lr=1e-3)),
    ({}, dict(type='SGD', lr=1e-3, momentum=0.9)),
], ids=['full', 'anchor-aware', 'lora', 'sgd'])
def test_bytes_are_those_of_a_model_that_is_built(model, optimizer):
    cfg = config(model, optimizer)
    report = diagnose(cfg)
    method, wrappers = really_built(cfg)
    for role in ('student', 'fake'):
        network, part = getattr(method, role), report.part(role)
        trained = [p for p in network.parameters() if p.requires_grad]
        state = [t for s in wrappers[role].optimizer.state.values() for t in s.values() if torch.is_tensor(t)]
        assert part.parameters == sum(p.numel() for p in network.parameters())
        assert part.weights == nbytes(network.parameters()) + nbytes(network.buffers())
        assert part.gradients == nbytes(p.grad for p in trained)
        assert part.optimizer == nbytes(state) > 0
    assert report.part('student').ema == nbytes(StudentEMA(method.student).weights.values())
    # All tensors of the method, each once.
    everything = {t.untyped_storage().data_ptr(): t.nbytes for t in [*method.parameters(), *method.buffers()]
                  if not t.untyped_storage().nbytes() == 0}
    conditioner = nbytes(method.backbone.conditioner.buffers())
    assert sum(part.weights for part in report.parts) == sum(everything.values()) - conditioner


@pytest.mark.parametrize('save, type, size', [
    (save_tiny_sd3, 'SD3Backbone', 16), (save_tiny_longcat, 'LongCatImageBackbone', 64),
    (save_tiny_flux, 'FluxBackbone', 16)], ids=['sd3', 'longcat', 'flux'])
def test_a_local_pipeline_is_counted_from_its_files(save, type, size, tmp_path):
    save(tmp_path)
    cfg = config()
    cfg.model = dict(type='CDM', image_size=size, backbone=dict(type=type, pretrained=str(tmp_path),
                                                                conditioner=dict(dtype='bfloat16')))
    with nothing_loads():
        report = diagnose(cfg)
    assert report.problems == []
    backbone = MODELS.build(cfg.model.to_dict()).backbone
    encoders = backbone.conditioner.encoders
    assert report.part('text encoders').parameters == sum(p.numel() for p in encoders.parameters())
    assert report.part('text encoders').weights == nbytes(encoders.parameters())
    assert report.part('VAE').weights == nbytes(backbone.codec.parameters()) + nbytes(backbone.codec.buffers())
    fields = backbone.conditioner.encode(['a fox']).fields
    null = build_on_meta(cfg.model.to_dict(), Report('', 1)).null_condition(1).fields
    assert {name: f.shape for name, f in null.items()} == {name: f.shape for name, f in fields.items()}


def test_a_pipeline_in_the_cache_is_counted_from_its_files(tmp_path):
    """In the layout of huggingface_hub's cache; the recipe's own config is checked against it."""
    snapshot = tmp_path / 'models--someone--tiny' / 'snapshots' / ('0' * 40)
    save_tiny_sd3(snapshot)
    refs = tmp_path / 'models--someone--tiny' / 'refs'
    refs.mkdir()
    (refs / 'main').write_text('0' * 40)
    cfg = config()
    cfg.model = dict(type='CDM', backbone=dict(type='SD3Backbone', pretrained='someone/tiny', cache_dir=str(tmp_path)))
    with nothing_loads():
        report = diagnose(cfg)
        assert report.problems == [] and 'cache' not in ' '.join(report.warnings)
        tiny = SD3Transformer2DModel.from_config(SD3Transformer2DModel.load_config(snapshot, subfolder='transformer'))
        assert report.part('teacher').parameters == sum(p.numel() for p in tiny.parameters())
        cfg.model.backbone.config = dict(num_layers=24)
        assert 'model.backbone.config.num_layers=24' in diagnose(cfg).problems[0]


def test_a_local_pipeline_without_its_weights_is_a_problem(tmp_path):
    save_tiny_sd3(tmp_path, t5=False)
    cfg = config()
    cfg.model = dict(type='CDM', backbone=dict(type='SD3Backbone', pretrained=str(tmp_path)))
    assert any('conditioner.t5=False' in p for p in diagnose(cfg).problems)
    cfg.model.backbone.conditioner = dict(t5=False)
    assert diagnose(cfg).problems == []
    (tmp_path / 'transformer' / 'diffusion_pytorch_model.safetensors').unlink()
    assert diagnose(cfg).problems == [f'{tmp_path / "transformer"} has no weights']
    (tmp_path / 'transformer' / 'diffusion_pytorch_model.safetensors.index.json').write_text(
        '{"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors"}}')
    (tmp_path / 'transformer' / 'part-1.safetensors').touch()
    assert 'lacks 1 files of weights, for example part-2.safetensors' in diagnose(cfg).problems[0]


# Activations


MIDDLE = dict(TINY_SD3, sample_size=16, pos_embed_max_size=16, num_layers=5, num_attention_heads=4,
              attention_head_dim=16, caption_projection_dim=64)


def middle_method(**model):
    backbone = dict(tiny_backbone(), config=dict(MIDDLE))
    return build_on_meta(dict(type='CDM', backbone=backbone, **model), Report('', 1))


@pytest.mark.parametrize('checkpointing, dtype, lora', [
    (False, None, None), (True, torch.bfloat16, None), (True, torch.bfloat16, dict(rank=4)),
    (False, torch.bfloat16, dict(rank=4))], ids=['kept', 'recomputed', 'lora recomputed', 'lora kept'])
def test_blocks_that_repeat_are_multiplied_as_if_all_had_run(checkpointing, dtype, lora):
    method = middle_method(activation_checkpointing=checkpointing, lora=lora)
    for role, grad in (('student', True), ('fake', True), ('teacher', False)):
        whole, estimate = footprint._run(method, role, 3, grad, dtype), measure(method, role, 3, grad, dtype)
        assert estimate.held == pytest.approx(whole.held, rel=1e-6)
        assert estimate.casts == whole.casts and estimate.held_casts == whole.held_casts
        assert estimate.forward == pytest.approx(whole.forward, rel=0.02)
        assert estimate.waiting + estimate.backward == pytest.approx(whole.waiting + whole.backward, rel=0.05)
    assert len(method.student.base.transformer_blocks if lora else method.student.transformer_blocks) == 5


def saved_for_backward(network, run):
    """Bytes that autograd keeps of a real call, each storage once, without the network's own weights."""
    own = {t.untyped_storage().data_ptr() for t in [*network.parameters(), *network.buffers()]}
    storages = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = (storage.nbytes(), t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = run()
    return sum(size for size, _ in storages.values()), out


def test_activations_are_those_that_autograd_keeps_in_a_real_call():
    method = MODELS.build(dict(type='CDM', backbone=dict(tiny_backbone(), config=dict(MIDDLE))))
    x, sigma = torch.randn(method.latent_shape(3)), torch.rand(3)
    kept, out = saved_for_backward(
        method.student, lambda: method.velocity('student', x, sigma, method.null_condition(3)))
    estimate = measure(middle_method(), 'student', 3, True, None)
    # The output waits too; tensors that stay alive without being saved are few.
    assert estimate.held == pytest.approx(kept + out.nbytes, rel=0.03)


@pytest.mark.parametrize('model', [
    dict(), dict(activation_checkpointing=True), dict(type='DMD2', student_every=2),
    dict(losses=dict(cdm=dict(guided=True)), max_batch_per_call=5), dict(fake_steps=2, student_every=1)],
    ids=['plain', 'recomputed', 'DMD2', 'limited', 'one rollout'])
def test_the_phases_are_those_of_a_real_iteration(model):
    """The largest of the phases against all tensors that are alive at one time in a student step on the CPU."""
    cfg = config(batch=8, hooks=[{'type': 'CDMHook'}])
    cfg.model = {'type': 'CDM', 'backbone': dict(tiny_backbone(), config=dict(MIDDLE)), **model}
    cfg.optim_wrapper.student.optimizer = cfg.optim_wrapper.fake.optimizer = dict(type='AdamW', lr=1e-3, foreach=False)
    report = diagnose(cfg)
    method, wrappers = really_built(cfg)
    for role in method.trained_roles:
        wrappers[role].zero_grad()
        wrappers[role].initialize_count_status(method, 0, 10)
    method.seed = 0
    data = dict(prompt=torch.tensor([0, 1, 2, 0, 1, 2, 0, 1]))
    method.iteration = 1  # a student step
    state = [t for role in method.trained_roles for s in wrappers[role].optimizer.state.values() for t in s.values()]
    tracker = footprint._Tracker([*method.parameters(), *method.buffers(), *state])
    with tracker:
        method.train_step(data, wrappers)
    assert max(report.phases.values()) == pytest.approx(tracker.peak, rel=0.1)


def test_activation_checkpointing_autocast_and_batch_change_what_they_should():
    plain, recomputed = middle_method(), middle_method(activation_checkpointing=True)
    whole = measure(plain, 'student', 4, True, None)
    assert measure(plain, 'student', 8, True, None).held == pytest.approx(2 * whole.held, rel=0.01)
    assert measure(recomputed, 'student', 4, True, None).held < whole.held / 4
    half = measure(plain, 'student', 4, True, torch.bfloat16)
    assert whole.held / 2 < half.held < 0.8 * whole.held  # norms stay float32
    linear = sum(p.numel() for module in plain.student.modules() if isinstance(module, (nn.Linear, nn.Conv2d))
                 for p in module.parameters())
    assert half.casts == 2 * linear and whole.casts == whole.held_casts == 0
    assert 0.9 * half.casts < half.held_casts < half.casts  # backward needs no bias
    assert measure(plain, 'teacher', 4, False, torch.bfloat16).casts == 0  # autocast keeps no copies of frozen weights
    assert measure(recomputed, 'student', 4, True, torch.bfloat16).held_casts < linear / 2


def test_gradients_and_optimizers_count_when_they_are_there():
    optimizers = [dict(type='AdamW', lr=1e-3, **kernel) for kernel in ({}, dict(fused=True))]
    (default, fused) = (diagnose(config(optimizer=o)) for o in optimizers)
    step = "student's optimizer"
    gradients = default.part('student').gradients
    assert default.phases[step] == 2 * gradients and fused.phases[step] == gradients
    cfg = config()
    for role in ('student', 'fake'):
        cfg.optim_wrapper[role].accumulative_counts = 2
    accumulated = diagnose(cfg)
    assert accumulated.phases[step] == 2 * gradients + default.part('fake').gradients
    assert 'accumulated' in accumulated.recipe['batch'] and accumulated.recipe['batch'].endswith('= 8')


# Network calls


def test_expected_rollout_by_hand():
    def rollout(levels, batch, ranks):
        method = tiny_method(type='DMD2', sample_sigmas=[1 - i / levels for i in range(levels)])
        return expected_calls(method, batch, ranks)

    assert rollout(1, 4, 2).rollout == 0
    assert rollout(2, 1, 1).rollout == 0.5
    assert rollout(2, 2, 1).rollout == rollout(2, 1, 2).rollout == 0.75
    # Of 3 levels and 2 samples, the larger index is 0, 1, 2 in 1, 3, 5 of 9 cases.
    assert rollout(3, 2, 1).rollout == pytest.approx(13 / 9)
    # Two ranks of one sample: a rank waits with one sample where it has arrived and the other has not.
    assert rollout(2, 1, 2).samples['student', False] == pytest.approx(0.75 + 1 - 1 / 5)
    assert rollout(4, 16, 8).rollout == pytest.approx(3, abs=1e-6)


def test_grid_lengths():
    assert grid_lengths(FixedTimeGrid([1.0, 0.5])) == {2: 1}
    assert grid_lengths(DynamicTimeGrid(max_steps=6, min_steps=3)) == {n: 0.25 for n in range(3, 7)}
    own = types.SimpleNamespace(sample=lambda generator: torch.ones(1 + int(torch.randint(2, (), generator=generator))))
    assert grid_lengths(own)[1] == pytest.approx(0.5, abs=0.1) and sum(grid_lengths(own).values()) == pytest.approx(1)


@pytest.mark.parametrize('ranks', [1, 3])
def test_expected_calls_are_the_mean_of_many_draws(ranks, monkeypatch):
    batch, many = 3, 1500
    method = tiny_method()
    calls = expected_calls(method, batch, ranks)
    monkeypatch.setattr(type(method), 'world_size', ranks)
    steps, moved, samples = [], [], []
    for method.iteration in range(0, 2 * many, 2):  # without the losses' draws
        draws = method.sample_draws(batch)
        steps.append(draws.rollout_steps)
        moved.append(draws.anchor.double().mean())
        samples.append(sum(max(int((draws.anchor > step).sum()), 1) for step in range(draws.rollout_steps)))
    turns = 1 / method.student_every
    for values, expected in ((steps, calls.rollout), (moved, calls.anchor),
                             (samples, calls.samples['student', False] - batch * (1 - turns))):
        values = torch.tensor(values, dtype=torch.float64)
        assert abs(values.mean() - expected) < 3.7 * values.std() / math.sqrt(many)


@pytest.mark.parametrize('model', [
    dict(type='CDM'), dict(type='DecoupledDMD'), dict(type='DMD2'), dict(type='TDM'),
    dict(type='CDM', max_batch_per_call=4),
    dict(type='CDM', losses=dict(cdm=dict(guided=True)), student_every=3),
    dict(type='CDM', fake_steps=3, student_every=2),
    dict(type='CDM', fake_steps=2, losses=dict(gan=dict(type='GANLoss', width=8))),
    dict(type='DMD2', losses=dict(gan=dict(type='GANLoss', width=8, r1=1.0)))],
    ids=['CDM', 'DecoupledDMD', 'DMD2', 'TDM', 'limited', 'guided', 'fake steps', 'GAN', 'GAN with R1'])
def test_expected_calls_are_those_of_real_iterations(model, labels):
    """Over a whole cycle, where the anchors alone are left to chance: a grid of one level has none."""
    method = tiny_method(time_grid=dict(type='FixedTimeGrid', sigmas=[1.0]), **model)
    optimizers, batch = recording_optimizers(method, lr=1e-3), 5
    labels['image'] = torch.rand(5, 1, 8, 8)
    calls, samples = Counter(), Counter()
    for method.iteration in range(method.student_every):
        method.train_step(labels, optimizers)
        calls.update(method.calls)
        samples.update(method.call_samples)
    expected = expected_calls(method, batch, 1)
    assert expected.cycle == method.student_every
    for ours, theirs in ((expected.calls, calls), (expected.samples, samples)):
        assert {k: n * method.student_every for k, n in ours.items() if n} == pytest.approx(dict(theirs))


def test_the_cost_of_a_cycle_is_the_one_of_the_table():
    """method.md's table: 36.5 forward passes a sample, one with gradient counted as 4."""
    one_block = read_config(SD3, {'model.backbone.config.num_layers': 1}).model.to_dict()
    calls = expected_calls(build_on_meta(one_block, Report('', 1)), 16, 1)
    assert calls.equivalents * calls.cycle == pytest.approx(36.5)
    assert 13.5 > expected_calls(tiny_method(), 16, 8).rollout > calls.rollout > 12


def test_questions_and_points_of_the_methods():
    asked = {type: ask(tiny_method(type=type)) for type in ('CDM', 'DecoupledDMD', 'DMD2')}
    assert asked == dict(CDM=(dict(teacher=4, fake=2), 1), DecoupledDMD=(dict(teacher=3, fake=1), 0),
                         DMD2=(dict(teacher=2, fake=1), 0))


# The recipe and what would fail


def test_the_recipe_is_resolved():
    recipe = report_of(SD3).recipe
    assert recipe['sample_sigmas'] == '[1, 0.75, 0.5, 0.25]; after the shift of 3: [1, 0.9, 0.75, 0.5]'
    assert diagnose(config(), gpus=8).recipe['batch'] == '4 x 8 GPUs = 32'
    assert diagnose(config()).recipe['batch'] == '4 x 1 GPU = 4'
    assert recipe['batch'] == '16 x 8 GPUs = 128' and recipe['iterations'] == '4,000, 2,000 student steps'
    assert recipe['image'] == '1024x1024 pixels, 4096 tokens, 333 of text'
    assert recipe['loss ca'].startswith('CALoss(') and 'CappedUniformSigma' in recipe['loss ca']
    assert 'lr 1e-05' in recipe['optimizer student'] and 'autocast bfloat16' in recipe['optimizer student']
    assert recipe['time grid'] == 'DynamicTimeGrid(min_steps 1, max_steps 28, low 0.25, high 0.95)'
    # exp(1.15) at 4096 tokens.
    assert 'shift of 3.158' in report_of(LONGCAT).recipe['sample_sigmas']
    assert 'knows the anchor' in report_of(CDM).recipe['fake score']
    assert (recipe['rollout'], recipe['sigma_shift']) == ('ode', 'none')
    other = config(model=dict(rollout='renoise'))
    other.model.type = 'DecoupledDMD'
    assert diagnose(other).recipe.items() >= dict(rollout='renoise', sigma_shift='scheduler').items()


@pytest.mark.parametrize('options, part', [
    ({'model.alpa': 3}, "did you mean 'alpha'"),
    ({'model.type': 'CMD'}, "did you mean 'CDM'"),
    ({'model.backbone.attention': 'flash'}, "model.backbone.attention='flash' cannot be used"),
    ({'model.backbone.attention': 'flush'}, "did you mean 'flash'"),
    ({'model.image_size': 17}, 'divisible by 2'),
    ({'model.lora': dict(rank=4, student='no/such.safetensors')}, "model.lora.student='no/such.safetensors'"),
    ({'model.backbone.dtype': 'bfloat16'}, 'cannot be trained without model.lora'),
    ({'model.backbone.pretrained': './no/folder'}, './no/folder'),
    ({'model.backbone.conditioner': dict(_delete_=True, type='EmbeddingConditioner', folder='no/embeddings')},
     'no/embeddings'),
    ({'model.backbone.quantization': dict(load_in_4bit=True), 'model.lora': dict(rank=4)}, 'bitsandbytes'),
    ({'optim_wrapper.fakes': dict(optimizer=dict(type='SGD', lr=1))}, 'optim_wrapper.fakes is no role'),
    ({'train_dataloader.dataset': dict(type='PromptDataset', data_root='no', ann_file='prompts.txt')},
     "ann_file='prompts.txt' does not exist"),
    ({'train_dataloader.dataset': dict(type='RepeatDataset', times=2, dataset=dict(
        type='EmbeddingDataset', data_root='no/embeddings'))}, "data_root='no/embeddings' does not exist"),
    ({'train_dataloader.dataset': dict(_delete_=True, type='WebDataset', urls='no/{0..3}.tar')},
     '`urls` of WebDataset: no/0.tar does not exist'),
    ({'train_dataloader.dataset': dict(_delete_=True, type='HFStream', path='acme/pictures')},
     'train_dataloader.sampler must be None, because HFStream has an order of its own'),
    ({'train_dataloader.dataset': dict(_delete_=True, type='ImageCaptionFolder', data_root='no/pictures')},
     "data_root='no/pictures' does not exist"),
], ids=lambda value: ','.join(value) if isinstance(value, dict) else '')
def test_what_would_fail_is_a_problem(options, part):
    cfg = config()
    cfg.merge_from_dict(options)
    report = diagnose(cfg)
    assert any(part in problem for problem in report.problems), report.problems
    assert f'problem: {report.problems[0]}' in format_report(report)


def test_a_package_that_the_data_need_is_a_problem_if_it_is_missing(monkeypatch):
    for kind, package, source in (('HFDataset', 'datasets', dict(path='acme/x')), ('WebDataset', 'webdataset', dict(
            urls='https://host/x.tar'))):
        cfg = config()
        cfg.train_dataloader.dataset = dict(type=kind, **source)
        monkeypatch.setattr(diagnosis, 'find_spec', lambda name: None if name == package else 1)
        assert any(f"{kind} needs the package {package}: pip install 'cdm_plugin[data]'" in problem
                   for problem in diagnose(cfg).problems)


def test_a_pretrained_model_that_cannot_be_downloaded_is_a_problem(monkeypatch):
    assert any('training will download it' in w for w in report_of(SD3).warnings)
    # One block of a known network is enough.
    cfg = read_config(SD3, {'model.backbone.config.num_layers': 1})
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    with nothing_loads():
        problem = diagnose(cfg).problems[1]
        assert 'stable-diffusion-3-medium' in problem and 'HF_HUB_OFFLINE' in problem
        cfg.model.backbone.config = None
        assert any('nothing can be counted' in p for p in diagnose(cfg).problems)


def test_several_gpus_are_a_problem_of_this_version():
    assert 'model_wrapper_cfg' in diagnose(config(), gpus=2).problems[0]


def test_memory_larger_than_the_gpu_is_a_problem(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    monkeypatch.setattr(diagnosis, '_attention', lambda *args: 'native')
    for total, problems in ((10 * 2**20, 0), (2**15, 1)):
        monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda i: types.SimpleNamespace(
            total_memory=total, name='a small GPU'))
        report = diagnose(config())
        assert len(report.problems) == problems and 'a small GPU' in format_report(report)
    assert 'this GPU has 0.0 MiB' in report.problems[0]


def test_checkpoints_that_lose_gradients_or_do_not_fit_the_disk_are_notes(monkeypatch):
    cfg = config(default_hooks=dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=6,
                                                    max_keep_ckpts=3)))
    cfg.optim_wrapper.student.accumulative_counts = 2
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: types.SimpleNamespace(free=1))
    notes = ' '.join(diagnose(cfg).warnings)
    assert 'interval=6 is no multiple of 4' in notes and 'do not fit' in notes


def test_the_config_is_not_changed():
    cfg = load_config(CDM)
    before = cfg.pretty_text
    diagnose(cfg)
    assert cfg.pretty_text == before


@pytest.mark.gpu
@pytest.mark.parametrize('model, wrapper', [
    (dict(activation_checkpointing=True, teacher_dtype='bfloat16'), 'AmpOptimWrapper'),
    (dict(), 'AmpOptimWrapper'), (dict(activation_checkpointing=True, lora=dict(rank=16)), 'AmpOptimWrapper'),
    (dict(activation_checkpointing=True), 'OptimWrapper')], ids=['recomputed', 'kept', 'lora', 'float32'])
def test_the_estimate_is_close_to_what_a_gpu_allocates(model, wrapper):
    shape = dict(sample_size=64, patch_size=2, in_channels=16, out_channels=16, num_layers=8, attention_head_dim=64,
                 num_attention_heads=12, joint_attention_dim=768, caption_projection_dim=768, pooled_projection_dim=4,
                 pos_embed_max_size=64)
    # 192 one-hot tokens of 3 classes and the null condition are 768 wide.
    backbone = dict(type='SD3Backbone', config=shape, scheduler=dict(shift=3.0), codec=dict(type='PixelCodec'),
                    conditioner=dict(type='ClassConditioner', num_classes=3, num_tokens=192))
    cfg = config(batch=8)
    cfg.model = dict(type='CDM', backbone=backbone, **model)
    for role in ('student', 'fake'):
        cfg.optim_wrapper[role] = dict(type=wrapper, optimizer=dict(type='AdamW', lr=1e-5, fused=True))
        if wrapper == 'AmpOptimWrapper':
            cfg.optim_wrapper[role].dtype = 'bfloat16'
    report = diagnose(cfg)
    assert report.problems == []
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    method = MODELS.build(cfg.model.to_dict()).cuda().train()
    method.student_ema = StudentEMA(method.student)
    wrappers = OPTIM_WRAPPER_CONSTRUCTORS.build(dict(
        type=cfg.optim_wrapper.constructor, optim_wrapper_cfg=cfg.optim_wrapper.to_dict()))(method)
    method.seed = 0
    torch.cuda.reset_peak_memory_stats()
    for method.iteration in range(4):
        method.train_step(dict(prompt=torch.arange(8) % 3), wrappers)
    peak = torch.cuda.max_memory_allocated() - before
    assert 0.7 < report.peak / peak < 1.4


@pytest.mark.parametrize('key, value, problem', [
    ('train_cfg.max_iters', -5, 'train_cfg.max_iters must be a whole number of 1 or more, but is -5'),
    ('train_dataloader.batch_size', 'abc',
     "train_dataloader.batch_size must be a whole number in [1, 1048576], but is 'abc'"),
    ('model.alpha', 'banana', "model.alpha must be a number, but is 'banana'"),
    ('custom_hooks.0.ema_decay', 2, 'custom_hooks[0].ema_decay must be a number in [0, 1) or None, but is 2'),
    ('model.losses', dict(cdm=dict(guided='banana')), "model.losses.cdm.guided must be True or False, but is 'banana'"),
    ('optim_wrapper.fake.optimizer.betas', (1.5, 0.9),
     'optim_wrapper.fake.optimizer: Invalid beta parameter at index 0: 1.5')])
def test_it_runs_the_checks_of_training(key, value, problem):
    assert diagnose(read_config(CDM, {key: value})).problems == [problem]
