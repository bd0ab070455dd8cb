"""What the README shows runs as it stands there."""
import re
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.runner import Runner
from tests_support import tiny_backbone

README = Path(__file__).parents[2] / 'README.md'
BLOCKS = re.findall(r'```python\n(.*?)```', README.read_text(encoding='utf-8'), re.DOTALL)


@pytest.mark.parametrize('method', ['DMD2', 'CDM'])
def test_the_config_trains_through_mmengines_own_runner(method, tmp_path):
    (tmp_path / 'my_config.py').write_text(next(b for b in BLOCKS if b.startswith('custom_imports')))
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


def test_the_loss_of_ones_own_trains(tmp_path):
    source = next(b for b in BLOCKS if 'class TeacherAgreement' in b)
    exec(source, {'__name__': 'readme_loss'})  # registers TeacherAgreement
    cfg = Config.fromfile(README.parent / 'configs/digits/cdm_sd3-digits_1xb32_4step_800.py')
    cfg.merge_from_dict({
        'train_cfg.max_iters': 2, 'train_dataloader.batch_size': 2, 'work_dir': str(tmp_path), 'log_level': 'ERROR',
        'experiment_name': 'readme-loss', 'model.losses.agreement': dict(type='TeacherAgreement', weight=0.1)})
    runner = Runner.from_cfg(cfg)
    runner.train()
    assert runner.message_hub.get_scalar('train/loss_agreement').current() > 0
