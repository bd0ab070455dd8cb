"""What README and docs/ show runs as it stands there."""
import re
from pathlib import Path

import pytest
import torch
from acme_distillation.network import AcmeTransformer2DModel
from acme_plugin import AcmePictures
from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS, TASK_UTILS
from mmengine.runner import Runner
from tests_support import tiny_backbone

from cdm_plugin.cli import main

ROOT = Path(__file__).parents[2]


def block(page, part):
    """The Python block of a page that has this part."""
    found = re.findall(r'```python\n(.*?)```', (ROOT / page).read_text(encoding='utf-8'), re.DOTALL)
    return next(text for text in found if part in text)


@pytest.fixture
def run_block():
    """Runs a block as a module, and takes what it has registered out again."""
    registries = (MODELS, TASK_UTILS)
    before = [dict(registry.module_dict) for registry in registries]

    def run(page, part, **names):
        names['__name__'] = 'docs_example'
        exec(block(page, part), names)
        return names

    yield run
    for registry, modules in zip(registries, before):
        registry._module_dict.clear()
        registry._module_dict.update(modules)


def short_run(tmp_path, **options):
    cfg = Config.fromfile(ROOT / 'configs/digits/cdm_sd3-digits_1xb32_4step_800.py')
    cfg.merge_from_dict({
        'train_cfg': dict(type='IterBasedTrainLoop', max_iters=2), 'train_dataloader.batch_size': 2,
        'val_dataloader': None, 'val_evaluator': None, 'val_cfg': None, 'custom_hooks': [dict(type='CDMHook')],
        'work_dir': str(tmp_path), 'log_level': 'ERROR', 'experiment_name': tmp_path.name, **options})
    runner = Runner.from_cfg(cfg)
    runner.train()
    return runner


@pytest.mark.parametrize('method', ['DMD2', 'CDM'])
def test_the_config_trains_through_mmengines_own_runner(method, tmp_path):
    (tmp_path / 'my_config.py').write_text(block('README.md', 'custom_imports'))
    cfg = Config.fromfile(tmp_path / 'my_config.py')
    cfg.merge_from_dict({
        'model.type': method, 'train_dataloader.batch_size': 2, 'train_dataloader.num_workers': 0,
        'train_cfg.max_iters': 5, 'default_hooks.logger.interval': 1, 'work_dir': str(tmp_path / 'run'),
        'log_level': 'ERROR', 'experiment_name': f'readme-{method}'})
    cfg.model.backbone = tiny_backbone()
    cfg.train_dataloader.dataset = dict(type='LabelDataset', num_classes=3, length=12)
    Runner.from_cfg(cfg).train()
    assert (tmp_path / 'run/iter_5.pth').is_file()
    assert list((tmp_path / 'run').rglob('events.out.tfevents.*'))


def test_the_loss_of_ones_own_trains(tmp_path, run_block):
    run_block('docs/extend.md', 'class TeacherAgreement')
    runner = short_run(tmp_path, **{'model.losses.agreement': dict(type='TeacherAgreement', weight=0.1)})
    assert runner.message_hub.get_scalar('train/loss_agreement').current() > 0


def test_the_discriminator_of_ones_own_trains(tmp_path, run_block):
    run_block('docs/extend.md', 'class LatentGAN')
    assert AcmePictures.__name__ in DATASETS
    runner = short_run(tmp_path, param_scheduler=None, **{
        'model.backbone': dict(tiny_backbone(), _delete_=True),
        'model.losses.gan': dict(type='LatentGAN', weight=0.01),
        'optim_wrapper.discriminator': dict(optimizer=dict(type='AdamW', lr=1e-4)),
        'train_dataloader.dataset': dict(_delete_=True, type='AcmePictures')})
    assert runner.message_hub.get_scalar('train/loss_discriminator').current() > 0


def test_the_method_and_the_time_grid_of_ones_own_train(tmp_path, run_block):
    run_block('docs/extend.md', 'class FixedCDM')
    grid = run_block('docs/extend.md', 'class HalvedGrid')['HalvedGrid']()
    levels = grid.sample(torch.Generator().manual_seed(0)).tolist()
    assert levels == [0.5 ** i for i in range(len(levels))]
    runner = short_run(tmp_path / 'method', **{'model.type': 'FixedCDM'})
    assert runner.message_hub.get_scalar('train/grid_steps').current() == 4
    short_run(tmp_path / 'grid', **{'model.time_grid': dict(type='HalvedGrid')})


def test_the_hook_of_ones_own_doubles_the_loss(run_block):
    hook = run_block('docs/extend.md', 'def cdm_after_iteration')['cdm_after_iteration']
    assert hook(3, dict(loss_fake=0.5)) == dict(double_loss=1.0) and hook(3, {}) is None


ACME = '''
model = dict(
    type='CDM', student_every=1, anchor_aware_fake=True,
    backbone=dict(type='AcmeBackbone', pretrained={folder!r}, conditioner=dict(type='ClassConditioner', num_classes=3),
                  codec=dict(type='PixelCodec', scale=2)))
train_dataloader = dict(batch_size=2, num_workers=0, sampler=dict(type='InfiniteSampler'),
                        dataset=dict(type='LabelDataset', num_classes=3))
optim_wrapper = dict(
    constructor='DistillationOptimWrapperConstructor',
    student=dict(optimizer=dict(type='SGD', lr=1e-3)), fake=dict(optimizer=dict(type='SGD', lr=1e-3)))
train_cfg = dict(type='IterBasedTrainLoop', max_iters=1)
custom_hooks = [dict(type='CDMHook')]
default_hooks = dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=1))
default_scope = 'mmengine'
log_level = 'ERROR'
'''


@pytest.mark.parametrize('change', ['', 'model.lora.rank=2'], ids=['weights', 'adapters'])
def test_the_backbone_of_ones_own_trains_and_is_exported(change, tmp_path, monkeypatch, capsys, run_block):
    run_block('docs/extend.md', 'class AcmeBackbone', AcmeTransformer2DModel=AcmeTransformer2DModel)
    AcmeTransformer2DModel().save_pretrained(tmp_path / 'acme/transformer')
    MODELS.build(tiny_backbone()).scheduler.save_pretrained(tmp_path / 'acme/scheduler')
    (tmp_path / 'own.py').write_text(ACME.format(folder=str(tmp_path / 'acme')))
    monkeypatch.chdir(tmp_path)
    options = ['--cfg-options', change] if change else []
    for argv in ('doctor own.py', 'train own.py --work-dir run', 'export own.py --checkpoint run --out student',
                 'sample own.py --checkpoint run --prompts 1 --num 1 --out before',
                 'sample student --prompts 1 --num 1 --out after'):
        assert main([*argv.split(), *([] if 'student --p' in argv else options)]) == 0, capsys.readouterr()
    assert (tmp_path / 'after/0000.png').read_bytes() == (tmp_path / 'before/0000.png').read_bytes()
    assert "load_method('.')" in (tmp_path / 'student/README.md').read_text()
