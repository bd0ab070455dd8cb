"""The shipped recipes: their names, the published numbers in them, and that they train."""
import math
import re
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from mmengine.runner import CheckpointLoader, FlexibleRunner, Runner
from PIL import Image
from recipes import (
    FLUX2_LORA,
    FLUX_LORA,
    KLEIN,
    KLEIN_CONSISTENT,
    KLEIN_DMD2,
    KLEIN_LORA,
    KREA2,
    KREA2_LORA,
    LONGCAT,
    LONGCAT_LORA,
    LONGCAT_OFFLOAD,
    LONGCAT_ZERO3,
    QWEN_IMAGE,
    QWEN_IMAGE_CONSISTENT,
    QWEN_IMAGE_DMD2,
    QWEN_IMAGE_LORA,
    SD3,
    SD3_CONSISTENT,
    SD3_GAN,
    SD3_LORA,
    SD3_OFFLOAD,
    SD3_ZERO2,
    SD35_LARGE,
    SD35_MEDIUM,
    Z_IMAGE,
    Z_IMAGE_CONSISTENT,
    Z_IMAGE_DMD2,
    Z_IMAGE_LORA,
    gpus_of,
    recipe_params,
    report_of,
    shipped,
)
from scale_support import launch
from tiny_pipelines import (
    save_tiny_flux,
    save_tiny_flux2,
    save_tiny_klein,
    save_tiny_krea2,
    save_tiny_longcat,
    save_tiny_qwen_image,
    save_tiny_sd3,
    save_tiny_z_image,
)

from cdm_plugin.commands.doctor.calls import expected_calls
from cdm_plugin.commands.doctor.meta import build_on_meta
from cdm_plugin.commands.doctor.report import Report
from cdm_plugin.config import RECIPES, load_config

METHODS = {'cdm': 'CDM', 'decoupled-dmd': 'DecoupledDMD', 'dmd2': 'DMD2', 'tdm': 'TDM',
           'teacher': 'FlowMatching'}
DISTILLATION = [name for name in shipped() if 'teacher' not in name]
LARGE = [name for name in shipped() if not name.startswith(('digits/', 'emoji/'))]
LAYERS = ('num_layers', 'num_single_layers', 'n_layers', 'n_refiner_layers')
# The folder's architecture.
BACKBONES = dict(digits='SD3Backbone', emoji='SD3Backbone', sd3='SD3Backbone', longcat='LongCatImageBackbone',
                 flux='FluxBackbone', flux2='Flux2KleinBackbone', krea2='Krea2Backbone',
                 **{'qwen-image': 'QwenImageBackbone', 'z-image': 'ZImageBackbone'})


def test_every_architecture_has_its_recipes():
    methods = ('cdm', 'cdm-consistent', 'cdm_lora', 'decoupled-dmd', 'dmd2')
    expected = {f'sd3/{m}_sd3-medium' for m in methods} | {f'longcat/{m}_longcat-image' for m in methods}
    newer = {f'{folder}/{m}_{model}' for folder, model in (
        ('flux2', 'flux2-klein-4b'), ('krea2', 'krea2'), ('qwen-image', 'qwen-image'), ('sd3', 'sd3.5-medium'),
        ('sd3', 'sd3.5-large'), ('z-image', 'z-image')) for m in ('cdm', 'cdm-consistent', 'cdm_lora', 'dmd2-aware')}
    assert {re.split(r'_[18]xb', name)[0] for name in LARGE} == expected | newer | {
        'flux/cdm_lora_flux-dev', 'flux2/cdm_lora_flux2-dev', 'sd3/dmd2-gan_sd3-medium',
        'sd3/cdm_lora_sd3-medium-style', 'z-image/cdm_lora_z-image-style'}
    assert {name for name in LARGE if '_zero' in name} == {LONGCAT_OFFLOAD, LONGCAT_ZERO3, SD3_OFFLOAD, SD3_ZERO2} | {
        name.replace('/cdm_', f'/{m}_') for m in ('cdm', 'cdm-consistent', 'dmd2-aware')
        for name in (KLEIN, KREA2, QWEN_IMAGE, SD35_LARGE, SD35_MEDIUM, Z_IMAGE)}


@pytest.mark.parametrize('recipe', shipped())
def test_a_recipe_is_what_its_name_says(recipe):
    cfg = load_config(recipe)
    folder, file = recipe.removesuffix('.py').split('/')
    method, gpus, batch, zero, offload, steps, iterations = re.fullmatch(
        r'([a-z0-9-]+)_(?:[a-z-]+_)?[a-z0-9.-]+_(\d+)xb(\d+)(?:_zero(\d)(-offload)?)?(?:_(\d+)step)?(?:_(\d+k?))?',
        file).groups()
    assert cfg.model.type == METHODS[re.sub('-(consistent|fixed-grid|aware|gan)$', '', method)]
    assert cfg.model.get('anchor_aware_fake', False) or '-aware' not in method
    assert ('gan' in cfg.model.get('losses', {})) == method.endswith('-gan')
    assert cfg.model.backbone.type == ('Flux2Backbone' if 'flux2-dev' in file else BACKBONES[folder])
    assert cfg.train_dataloader.batch_size == int(batch)
    assert (iterations is None) == (zero is not None)
    if zero is None:
        assert cfg.train_cfg.max_iters == int(iterations.replace('k', '000')) and 'strategy' not in cfg
    else:
        assert (cfg.runner_type, cfg.strategy.type) == ('FlexibleRunner', 'DistillationDeepSpeedStrategy')
        settings = cfg.strategy.zero_optimization
        assert settings.stage == int(zero) and ('offload_optimizer' in settings) == (offload is not None)
        assert ('offload_param' in settings) == (offload is not None and zero == '3')
    assert (cfg.model.get('lora') is not None) == ('_lora_' in file) and (int(gpus) > 1) == ('_8x' in file)
    if steps is not None:
        assert len(cfg.model.sample_sigmas) == int(steps)
    assert [hook['type'] for hook in cfg.custom_hooks][:2] == ['CDMHook', 'SampleGridHook']


@pytest.mark.parametrize('recipe, gpus, batch, iterations, student_steps', [
    (SD3, 8, 16, 4000, 2000), pytest.param(LONGCAT, 8, 8, 2000, 1000, marks=pytest.mark.slow)], ids=['sd3', 'longcat'])
def test_the_published_numbers(recipe, gpus, batch, iterations, student_steps):
    """What the paper and its authors' code say of their runs."""
    cfg = load_config(recipe)
    assert f'_{gpus}xb{batch}_' in recipe and cfg.train_dataloader.batch_size == batch
    assert cfg.train_cfg.max_iters == iterations
    for role, lr in (('student', 1e-5), ('fake', 5e-6)):
        wrapper = cfg.optim_wrapper[role]
        assert wrapper.optimizer.to_dict() == dict(type='AdamW', lr=lr, betas=(0.9, 0.999), weight_decay=1e-4,
                                                   fused=True)
        assert wrapper.clip_grad == dict(max_norm=1.0) and wrapper.get('accumulative_counts', 1) == 1
        assert (wrapper.type, wrapper.dtype) == ('AmpOptimWrapper', 'bfloat16')
        (warm_up,) = cfg.param_scheduler[role]
        assert (warm_up.type, warm_up.begin, warm_up.end, warm_up.by_epoch) == ('LinearLR', 0, 100, False)
    assert cfg.model.alpha == 7 and cfg.model.image_size == 1024
    assert cfg.model.sample_sigmas == [1.0, 0.75, 0.5, 0.25]
    assert cfg.model.activation_checkpointing and cfg.model.teacher_dtype == 'bfloat16'
    assert cfg.model.backbone.conditioner == dict(dtype='bfloat16') and 'dtype' not in cfg.model.backbone
    # Nothing else of the method is set: its defaults are the published recipe.
    assert set(cfg.model) == {'type', 'backbone', 'sample_sigmas', 'alpha', 'image_size', 'teacher_dtype',
                              'activation_checkpointing'}
    resolved = report_of(recipe).recipe
    assert resolved['iterations'] == f'{iterations:,}, {student_steps:,} student steps'
    assert resolved['fake_merge'] == '0.001' and 'max_steps 28, low 0.25, high 0.95' in resolved['time grid']


CONSISTENT = dict(
    anchor_aware_fake=True,
    losses=dict(ca=dict(sigma=dict(type='UniformSigma')), cdm=dict(guided=True, point_sigma=dict(type='AnchorSigma'))),
    time_grid=dict(type='FixedTimeGrid'), fake_steps=2, student_every=1)
TWICE = {'_2k': '_4k', '_1k': '_2k'}


@pytest.mark.parametrize('consistent', [name for name in LARGE if '/cdm-consistent' in name])
def test_the_consistent_recipe_is_the_published_one_and_what_is_best_on_the_digits(consistent):
    """In half of the iterations, since each has a student step."""
    published = load_config(re.sub('_[12]k', lambda iterations: TWICE[iterations[0]],
                                   consistent.replace('cdm-consistent', 'cdm')))
    cfg = load_config(consistent)
    cfg.pop('consistent')  # what _base_/consistent.py gives by name
    for key, value in CONSISTENT.items():
        assert cfg.model.pop(key) == value, key
    if cfg.optim_wrapper.student.get('accumulative_counts', 1) > 1:
        assert cfg.optim_wrapper.fake.accumulative_counts == 1  # the steps of one rollout are not joined
        cfg.optim_wrapper.fake.accumulative_counts = published.optim_wrapper.fake.accumulative_counts
    halved = published.copy()
    halved.train_cfg.max_iters //= 2
    for role in ('student', 'fake'):
        halved.param_scheduler[role][0].end //= 2
    for hook in (halved.default_hooks.checkpoint, halved.custom_hooks[1]):
        hook.interval //= 2
    assert cfg.to_dict() == halved.to_dict()


def test_the_demo_has_the_consistent_recipe_of_the_large_models():
    demo = load_config('digits/cdm-fixed-grid_sd3-digits_1xb32_4step_400.py').model
    assert {key: demo[key] for key in CONSISTENT} == CONSISTENT


@pytest.mark.parametrize('aware', [name for name in LARGE if '/dmd2-aware' in name])
def test_the_aware_dmd2_is_the_consistent_cdm_with_another_type(aware):
    cfg, consistent = load_config(aware), load_config(aware.replace('dmd2-aware', 'cdm-consistent'))
    assert (cfg.model.type, consistent.model.type) == ('DMD2', 'CDM')
    consistent.model.type = 'DMD2'
    assert cfg.to_dict() == consistent.to_dict()


def one_block(recipe, **model):
    """A recipe's method with the depth of one block, which is enough to count calls."""
    config = load_config(recipe).model.backbone.config
    layers = {f'model.backbone.config.{key}': 1 for key in LAYERS if key in config}
    return build_on_meta(load_config(recipe, {'model': model, **layers}).model.to_dict(), Report('', 1))


@pytest.mark.parametrize('recipe', [pytest.param(name, marks=() if name in (SD3_CONSISTENT, Z_IMAGE_DMD2)
                                                 else pytest.mark.slow) for name in LARGE
                                    if '/cdm-consistent' in name or '/dmd2-aware' in name])
def test_what_the_consistent_recipes_cost(recipe):
    """A student step by hand, activations recomputed: 1.5 of the rollout to one of four levels, 2 x 4 of the fake
    score's steps. Of CDM then 2 x 4 of the student's predictions, and the questions of CA (2), DM (2) and its own
    guided loss (3); of DMD2 4 of a prediction, and the 3 questions of its guided DM. A rank whose samples have all
    arrived keeps one in the rollout's calls, which adds up to 0.1 at a batch of 4."""
    batch, method = load_config(recipe).train_dataloader.batch_size, one_block(recipe)
    forwards = 1.5 + 2 * 4 + (2 * 4 + 2 + 2 + 3 if '/cdm' in recipe else 4 + 3)
    calls = expected_calls(method, batch, gpus_of(recipe))
    assert forwards <= calls.equivalents < forwards + 0.1 and calls.cycle == 1
    assert expected_calls(method, batch, 1).equivalents == pytest.approx(forwards)


def test_the_consistent_recipe_goes_back_to_the_dynamic_grid_in_one_line():
    """Of N levels, 1 to 28, any is the anchor: 6.75 forwards a rollout in the mean, of which there are two."""
    (model,) = re.findall(r'^# model = (dict\(.+\))$', (RECIPES / '_base_/consistent.py').read_text(), re.M)
    method = one_block(SD3_CONSISTENT, **eval(model))
    assert (method.time_grid.max_steps, method.fake_steps, method.student_every) == (28, 1, 2)
    forwards = 2 * 6.75 + 1 + 2 * 4 + 2 * 4 + 2 + 2 + 3  # and samples for the second fake-score step, without gradient
    assert 2 * expected_calls(method, 16, 1).equivalents == pytest.approx(forwards) == 37.5


@pytest.mark.parametrize('recipe', recipe_params(DISTILLATION))
def test_model_type_alone_swaps_methods(recipe):
    options = {'model.backbone.pretrained': None} if recipe.startswith('emoji/') else {}  # its teacher is not there yet
    if recipe in LARGE:  # one block is enough to see that the settings fit
        config = load_config(recipe).model.backbone.config
        options = {f'model.backbone.config.{key}': 1 for key in LAYERS if key in config}
    for type, losses in (('CDM', {'ca', 'dm', 'cdm'}), ('DecoupledDMD', {'ca', 'dm'}), ('DMD2', {'dm'})):
        cfg = load_config(recipe, {'model.type': type, **options})
        method = build_on_meta(cfg.model.to_dict(), Report('', 1))
        gan = {'gan'} if '-gan' in recipe else set()
        left_out = {name for name, loss in cfg.model.get('losses', {}).items() if loss is None}
        assert method.__class__.__name__ == type and set(method.losses) == (losses | gan) - left_out
        assert {method.losses[name].alpha for name in losses - left_out} == {cfg.model.alpha}


@pytest.mark.parametrize('recipe', [name for name in LARGE if '_lora_' in name])
def test_checkpoints_of_lora_recipes_lose_no_gradients(recipe):
    cfg = load_config(recipe)
    counts = {cfg.optim_wrapper[role].accumulative_counts for role in ('student', 'fake')}
    assert counts == {4} and cfg.default_hooks.checkpoint.interval % (4 * math.lcm(2, 5)) == 0
    assert cfg.model.backbone.dtype == 'bfloat16' and cfg.model.get('teacher_dtype') is None
    # Ten times the published rates, in their ratio.
    assert (cfg.optim_wrapper.student.optimizer.lr, cfg.optim_wrapper.fake.optimizer.lr) == (1e-4, 5e-5)
    assert cfg.model.lora == dict(rank=64, alpha=128)


@pytest.mark.parametrize('recipe', [FLUX_LORA, FLUX2_LORA])
def test_a_guidance_embedded_teacher_is_distilled_with_its_own_guidance(recipe):
    """Its velocity has that without a prompt too: no call asks for the difference."""
    cfg = load_config(recipe)
    assert cfg.model.backbone.config.guidance_embeds and 'embedded_guidance' not in cfg.model.backbone
    report = report_of(recipe)
    assert cfg.model.losses == dict(ca=None) and report.recipe['alpha'].startswith('0 (')
    # DM's question and CDM's, every second iteration.
    assert report.calls.samples['teacher', False] == 1


@pytest.mark.parametrize('published, sharded', [(SD3, SD3_ZERO2), (LONGCAT, LONGCAT_ZERO3)], ids=['sd3', 'longcat'])
def test_a_sharded_recipe_is_the_published_one_and_its_strategy(published, sharded):
    cfg = load_config(sharded).to_dict()
    assert cfg.pop('runner_type') and cfg.pop('strategy')
    assert cfg == load_config(published).to_dict()


def tiny_flux_dev(folder):
    return save_tiny_flux(folder, guidance_embeds=True)


def slow(*values, id):
    return pytest.param(*values, id=id, marks=pytest.mark.slow)


@pytest.mark.parametrize('recipe, save, size', [
    pytest.param(SD3, save_tiny_sd3, 16, id='sd3'), pytest.param(FLUX_LORA, tiny_flux_dev, 16, id='flux lora'),
    pytest.param(LONGCAT_ZERO3, save_tiny_longcat, 64, id='longcat zero3'),
    slow(SD3_GAN, save_tiny_sd3, 16, id='sd3 gan'), slow(SD3_LORA, save_tiny_sd3, 16, id='sd3 lora'),
    slow(LONGCAT, save_tiny_longcat, 64, id='longcat'),
    slow(LONGCAT_LORA, save_tiny_longcat, 64, id='longcat lora'), slow(SD3_ZERO2, save_tiny_sd3, 16, id='sd3 zero2'),
    slow(SD3_OFFLOAD, save_tiny_sd3, 16, id='sd3 offload'),
    slow(LONGCAT_OFFLOAD, save_tiny_longcat, 64, id='longcat offload'),
    pytest.param(Z_IMAGE_LORA, save_tiny_z_image, 16, id='z-image lora'),
    slow(SD35_MEDIUM, save_tiny_sd3, 16, id='sd3.5-medium'),
    slow(SD35_LARGE, save_tiny_sd3, 16, id='sd3.5-large'),
    slow(KREA2_LORA, save_tiny_krea2, 16, id='krea2 lora'), slow(KREA2, save_tiny_krea2, 16, id='krea2'),
    slow(FLUX2_LORA, save_tiny_flux2, 32, id='flux2 lora'),
    slow(KLEIN_LORA, save_tiny_klein, 32, id='klein lora'),
    *(slow(name, save_tiny_klein, 32, id=name) for name in (KLEIN, KLEIN_CONSISTENT, KLEIN_DMD2)),
    slow(QWEN_IMAGE_LORA, save_tiny_qwen_image, 16, id='qwen-image lora'),
    *(slow(name, save_tiny_qwen_image, 16, id=name) for name in (QWEN_IMAGE, QWEN_IMAGE_CONSISTENT, QWEN_IMAGE_DMD2)),
    *(slow(name, save_tiny_z_image, 16, id=name) for name in (Z_IMAGE, Z_IMAGE_CONSISTENT, Z_IMAGE_DMD2))])
def test_a_recipe_trains_a_tiny_pipeline(recipe, save, size, tmp_path):
    """The real recipe: another pretrained model, and what `config` states about it left out."""
    save(tmp_path / 'pipeline')
    (tmp_path / 'prompts.txt').write_text('a red fox\na lighthouse\ndogs and birds\n')
    cfg = load_config(recipe, {
        'model.backbone.pretrained': str(tmp_path / 'pipeline'), 'model.backbone.config': None,
        'model.image_size': size, 'train_dataloader.batch_size': 2, 'train_dataloader.num_workers': 0,
        'train_dataloader.persistent_workers': False,
        'train_dataloader.dataset.ann_file': str(tmp_path / 'prompts.txt'), 'train_cfg.max_iters': 2,
        'work_dir': str(tmp_path / 'run'), 'experiment_name': f'recipe-{recipe}-{tmp_path.name}'.replace('/', '-'),
        'log_level': 'ERROR', 'custom_hooks.1.num_images': 1, 'custom_hooks.1.teacher_steps': 2,
        'default_hooks.logger.interval': 1})
    if 'fake_steps' not in cfg.model:  # on the dynamic grid, with two rollouts
        cfg.merge_from_dict({'model.time_grid': dict(max_steps=3), 'model.student_every': 2})
    if recipe == SD3_GAN:
        Image.new('RGB', (20, 18), 'teal').save(tmp_path / 'picture.png')
        (tmp_path / 'captions.jsonl').write_text('{"caption": "a red fox", "image": "picture.png"}\n' * 2)
        cfg.train_dataloader.dataset.update(ann_file='captions.jsonl', data_root=str(tmp_path), data_prefix={})
        cfg.train_dataloader.dataset.data_prefix.image = ''
        cfg.train_dataloader.dataset.pipeline[1].sizes = size
    for role in cfg.param_scheduler:
        cfg.optim_wrapper[role].accumulative_counts = 1
        cfg.param_scheduler[role] = []
    if 'strategy' in cfg:
        train_sharded(cfg)
    else:
        train_whole(cfg)


def train_whole(cfg):
    """Two iterations move student and fake score, and nothing else."""
    runner = Runner.from_cfg(cfg)
    before = {role: [p.detach().clone() for p in getattr(runner.model, role).parameters()]
              for role in ('student', 'fake', 'teacher')}
    runner.train()
    for role, weights in before.items():
        moved = any(not torch.equal(p, q) for p, q in zip(getattr(runner.model, role).parameters(), weights))
        assert moved == (role != 'teacher'), role
    assert runner.iter == 2 and Path(cfg.work_dir, 'iter_2.pth').is_file()
    assert any(Path(cfg.work_dir, 'export').iterdir())


def train_sharded(cfg):
    """The same under DeepSpeed, in a process of its own, against the float32 weights that it starts from."""
    pytest.importorskip('deepspeed', reason='needs DeepSpeed, which the extra `test` installs')
    cfg.dump(f'{cfg.work_dir}.py')
    launch(run_config, f'{cfg.work_dir}.py', world_size=1)
    method = MODELS.build(cfg.model)
    after = CheckpointLoader.load_checkpoint(f'{cfg.work_dir}/iter_2.pth', 'cpu')['state_dict']
    for role in ('student', 'fake'):
        before = {name: weight for name, weight in getattr(method, role).named_parameters()
                  if 'anchor_embedding' not in name}  # which is new in every process
        assert any(not torch.equal(after[f'{role}.{name}'], weight) for name, weight in before.items()), role
        assert all(torch.allclose(after[f'{role}.{name}'], weight, atol=1e-3) for name, weight in before.items()), role


def run_config(path):
    FlexibleRunner.from_cfg(Config.fromfile(path)).train()
