"""A team's library with registries and a `default_scope` of its own: every command finds its classes."""
import json
import sys

import pytest
from mmengine import registry as root
from tests_support import tiny_backbone

from cdm_plugin.cli import main
from cdm_plugin.commands.evaluate.metrics import build_metrics

KINDS = ('MODELS', 'DATASETS', 'METRICS')
REGISTRY = 'from mmengine import registry as root\n' + ''.join(
    f"{kind} = root.Registry({kind.lower()!r}, parent=root.{kind}, scope='acme_team', locations=['acme_team.parts'])\n"
    for kind in KINDS)
PARTS = '''
from acme_team.registry import DATASETS, METRICS, MODELS
from cdm_plugin.backbones import SD3Backbone
from cdm_plugin.data import LabelDataset
from cdm_plugin.methods import DMD2
from cdm_plugin.metrics import ScoreMetric

@MODELS.register_module()
class TeamBackbone(SD3Backbone):
    pass

@MODELS.register_module()
class TeamDMD2(DMD2):
    pass

@DATASETS.register_module()
class TeamDataset(LabelDataset):
    def __init__(self, number, **kwargs):
        super().__init__(**kwargs)

@METRICS.register_module()
class TeamMetric(ScoreMetric):
    key = 'ink'

    def scores(self, images, prompts):
        return images.flatten(1).mean(1)
'''
CONFIG = '''
default_scope = 'acme_team'
model = dict(type='TeamDMD2', backbone={backbone})
train_dataloader = dict(batch_size=2, num_workers=0, sampler=dict(type='InfiniteSampler'),
                        dataset=dict(type='TeamDataset', number=1, num_classes=3))
optim_wrapper = dict(
    constructor='DistillationOptimWrapperConstructor',
    student=dict(optimizer=dict(type='SGD', lr=1e-3)), fake=dict(optimizer=dict(type='SGD', lr=1e-3)))
train_cfg = dict(type='IterBasedTrainLoop', max_iters=1)
custom_hooks = [dict(type='CDMHook')]
default_hooks = dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=1))
val_dataloader = dict(batch_size=2, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False),
                      dataset=dict(type='TeamDataset', number=1, num_classes=3, length=2))
val_evaluator = dict(type='TeamMetric')
val_cfg = dict()
log_level = 'ERROR'
'''


@pytest.fixture
def team(tmp_path, monkeypatch):
    """The library, and a config of it in the current folder."""
    folder = tmp_path / 'acme_team'
    folder.mkdir()
    for name, text in dict(__init__='', registry=REGISTRY, parts=PARTS).items():
        (folder / f'{name}.py').write_text(text)
    (tmp_path / 'team.py').write_text(CONFIG.format(backbone=dict(tiny_backbone(), type='TeamBackbone')))
    (tmp_path / 'labels.txt').write_text('0\n1\n')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for kind in KINDS:
        getattr(root, kind).children.pop('acme_team', None)
    for name in [name for name in sys.modules if name.partition('.')[0] == 'acme_team']:
        del sys.modules[name]


def test_every_command_finds_its_classes(team, capsys):
    for argv in ('doctor team.py', 'train team.py --work-dir run',
                 'sample team.py --checkpoint run --prompts 0 --num 1 --out images',
                 'sample team.py --checkpoint run --prompts 0 --num 1 --role teacher --out teacher',
                 'export team.py --checkpoint run --out student',
                 'evaluate a=team.py@run --prompts labels.txt --out evaluation'):
        assert main(argv.split()) == 0, capsys.readouterr().err
    assert (team / 'images/0000.png').is_file() and (team / 'teacher/0000.png').is_file()
    parts = json.loads((team / 'student/cdm_parts.json').read_text())
    assert parts['backbone'] == 'TeamBackbone' and parts['recipe']['method'] == 'TeamDMD2'
    assert 'ink' in (team / 'evaluation/results.md').read_text()


def test_its_keys_are_checked_where_they_are_used(team, capsys):
    change = ['--cfg-options', 'train_dataloader.dataset.type=NoDataset', 'optim_wrapper.student.optimizer.type=None']
    assert main(['sample', 'team.py', '--untrained', '--prompts', '0', '--num', '1', *change]) == 0
    for wrong in ('model.alpa=1', 'model.backbone.conditioner.num_clases=3'):
        assert main(['sample', 'team.py', '--untrained', '--prompts', '0', '--cfg-options', wrong]) == 2
        assert f'cdm sample: {wrong[:-2]} is unknown' in capsys.readouterr().err


def test_metrics_are_of_the_scope_of_their_config(team):
    (team / 'metrics.py').write_text("default_scope = 'acme_team'\nmetrics = [dict(type='TeamMetric')]\n")
    (team / 'plain.py').write_text("metrics = [dict(type='DigitMetric')]\n")
    kinds = [type(metric).__name__ for metric in build_metrics(['metrics.py', 'plain.py'], [])]
    assert kinds == ['TeamMetric', 'DigitMetric']
    with pytest.raises(ValueError, match="'TeamMetric' is not registered"):
        build_metrics(['plain.py', 'TeamMetric'], [])
