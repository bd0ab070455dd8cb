"""Habits of MMEngine that do not go with several networks: each works, or is one line with the key to use."""
import pytest
import torch
from mmengine.config import Config
from mmengine.runner import FlexibleRunner, Runner
from tests_support import tiny_backbone

from cdm_plugin.cli import main
from cdm_plugin.commands.doctor.diagnosis import diagnose
from cdm_plugin.engine import AutocastOptimWrapper
from cdm_plugin.engine.refusals import add_missing_hook, refusals


def wrapper(**settings):
    return dict(optimizer=dict(type='AdamW', lr=1e-3), **settings)


def config(name='refusals', iterations=2, **changes):
    return Config(dict(dict(
        model=dict(type='CDM', student_every=1, backbone=tiny_backbone()),
        train_dataloader=dict(batch_size=2, num_workers=0, sampler=dict(type='InfiniteSampler'),
                              dataset=dict(type='LabelDataset', num_classes=3)),
        optim_wrapper=dict(constructor='DistillationOptimWrapperConstructor', student=wrapper(), fake=wrapper()),
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=iterations), custom_hooks=[dict(type='CDMHook')],
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=4)),
        default_scope='mmengine', log_level='ERROR', randomness=dict(seed=0), experiment_name=name), **changes))


OURS = dict(constructor='DistillationOptimWrapperConstructor', student=wrapper(), fake=wrapper())
STREAM = dict(batch_size=2, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=True),
              dataset=dict(type='HFStream', path='acme/pictures'))
MIX = dict(batch_size=2, num_workers=0, sampler=dict(type='MixSampler'),
           dataset=dict(type='WeightedMixDataset', sources=dict(
               labels=dict(dataset=dict(type='LabelDataset', num_classes=3)))))
REFUSED = {
    'compile': (dict(compile=True), 'compile=True .* model.backbone.compile=True'),
    'compile with options': (dict(compile=dict(mode='default')), 'set model.backbone.compile=True'),
    'fsdp': (dict(strategy=dict(type='FSDPStrategy')), "strategy.type='FSDPStrategy' .*'DistillationDeepSpeed"),
    'ddp strategy': (dict(strategy=dict(type='DDPStrategy')), "strategy.type='DDPStrategy' .* model_wrapper_cfg=dict"),
    'their deepspeed': (dict(strategy=dict(type='mmengine.DeepSpeedStrategy')), "type='DistillationDeepSpeedStrategy'"),
    'ddp': (dict(model_wrapper_cfg=dict(type='MMDistributedDataParallel')), "must be 'DistillationDataParallel'"),
    'fsdp wrapper': (dict(model_wrapper_cfg=dict(type='MMFullyShardedDataParallel')), "'MMFullyShardedDataParallel'"),
    "their tools' --amp": (dict(optim_wrapper=dict(OURS, type='AmpOptimWrapper', loss_scale='dynamic')),
                           "optim_wrapper.type='AmpOptimWrapper' .* optim_wrapper.student.type; .*cdm train --amp"),
    'one optimizer': (dict(optim_wrapper=wrapper()), 'optim_wrapper needs constructor=.*: student, fake'),
    'no constructor': (dict(optim_wrapper=dict(student=wrapper(), fake=wrapper())), 'optim_wrapper needs constructor='),
    'two averages': (dict(custom_hooks=[dict(type='mmengine.EMAHook'), dict(type='CDMHook')]), 'remove EMAHook, or'),
    'a sampler for a stream': (dict(train_dataloader=STREAM),
                               'train_dataloader.sampler must be None, because HFStream has an order of its own'),
    'no sampler for a stream': (
        dict(train_dataloader={k: v for k, v in STREAM.items() if k != 'sampler'}), 'sampler must be None'),
    'epochs of a stream': (dict(train_dataloader=dict(STREAM, sampler=None),
                                train_cfg=dict(by_epoch=True, max_epochs=1)),
                           "dataset.type='HFStream' has no end, and train_cfg counts epochs"),
    'validation on a stream': (dict(val_dataloader=STREAM, val_cfg=dict(), val_evaluator=[]),
                               "val_dataloader.dataset.type='HFStream' has no end: take a dataset with a length"),
    'a stream in another dataset': (
        dict(train_dataloader=dict(STREAM, dataset=dict(type='SkipBadRecords', dataset=STREAM['dataset']))),
        'train_dataloader.dataset has a stream inside of another dataset'),
    'epochs without end': (dict(train_cfg=dict(by_epoch=True, max_epochs=1)),
                           r"sampler.type='InfiniteSampler' has no end.*max_iters=\.\.\.\), or DefaultSampler"),
    'epochs of a mix': (dict(train_cfg=dict(by_epoch=True, max_epochs=1), train_dataloader=MIX),
                        r"sampler.type='MixSampler' has no end.*max_iters=\.\.\.\) \(cdm")}


@pytest.mark.parametrize('name', REFUSED)
def test_refused_in_one_line_by_the_command_and_the_doctor(name, tmp_path, capsys):
    changes, message = REFUSED[name]
    config(**changes).dump(tmp_path / 'own.py')
    assert main(['train', str(tmp_path / 'own.py'), '--work-dir', str(tmp_path / 'run')]) == 2
    line, = [line for line in capsys.readouterr().err.splitlines() if line.startswith('cdm train: ')]
    problems = diagnose(config(**changes)).problems
    assert len(problems) == 1 and problems[0] in line
    with pytest.raises(ValueError, match=message):
        raise ValueError(line)


def test_refused_by_mmengines_own_runner_too(tmp_path):
    runner = Runner.from_cfg(config('refusals-compile', work_dir=str(tmp_path), compile=True))
    with pytest.raises(ValueError, match='set model.backbone.compile=True'):
        runner.train()


def test_what_goes_is_not_refused():
    kinds = (dict(), dict(strategy=dict(type='SingleDeviceStrategy')), dict(compile=False),
             dict(model=dict(type='TheirModel'), compile=True),
             dict(strategy=dict(type='DistillationDeepSpeedStrategy')),
             dict(model_wrapper_cfg=dict(type='DistillationDataParallel')),
             dict(custom_hooks=[dict(type='CDMHook', ema_decay=None), dict(type='EMAHook')]),
             dict(train_cfg=dict(by_epoch=True, max_epochs=1),
                  train_dataloader=dict(sampler=dict(type='DefaultSampler', shuffle=True))))
    assert [list(refusals(config(**kind))) for kind in kinds] == [[]] * len(kinds)
    assert list(refusals({})) == list(refusals(Config())) == []


def test_several_processes_need_a_wrapper_or_shards(tmp_path, capsys):
    config().dump(tmp_path / 'own.py')
    assert main(['train', str(tmp_path / 'own.py'), '--launcher', 'pytorch']) == 2
    problem, = diagnose(config(), gpus=2).problems
    assert problem in capsys.readouterr().err and "model_wrapper_cfg=dict(type='DistillationDataParallel')" in problem
    for good in (dict(model_wrapper_cfg=dict(type='DistillationDataParallel')), dict(
            strategy=dict(type='DistillationDeepSpeedStrategy'))):
        assert list(refusals(config(**good), processes=2)) == []


def test_hooks_of_their_own_are_enough():
    names = ('IterationHook', 'ValidationHook')
    cfg = config(custom_hooks=[dict(type=name) for name in names])
    assert add_missing_hook(cfg) == [] and len(cfg.custom_hooks) == 2
    assert add_missing_hook(dict(model=dict(type='TheirModel'))) == []


def test_a_forgotten_hook_is_added(tmp_path, capfd):
    config('forgotten', log_level='WARNING', custom_hooks=[dict(type='EmptyCacheHook')]).dump(tmp_path / 'own.py')
    run = tmp_path / 'run'
    assert main(['train', str(tmp_path / 'own.py'), '--work-dir', str(run), '--cfg-options',
                 'default_hooks.checkpoint.interval=2']) == 0
    assert 'custom_hooks has no CDMHook: commands add it' in ''.join(capfd.readouterr())
    assert torch.load(run / 'iter_2.pth', weights_only=True)['student_ema']['steps'] == 2


def test_amp_is_every_roles(tmp_path, monkeypatch):
    runners = []
    from_cfg = Runner.from_cfg
    monkeypatch.setattr(Runner, 'from_cfg', lambda cfg: runners.append(from_cfg(cfg)) or runners[-1])
    config('refusals-amp').dump(tmp_path / 'own.py')
    assert main(['train', str(tmp_path / 'own.py'), '--work-dir', str(tmp_path / 'run'), '--amp']) == 0
    assert [type(w) for w in runners[0].optim_wrapper.values()] == [AutocastOptimWrapper] * 2
    assert all(w.dtype == torch.bfloat16 for w in runners[0].optim_wrapper.values())


def test_a_flexible_runner_on_one_device_trains_and_resumes_as_runner_does(tmp_path):
    def run(name, cls, iterations=7, folder=None, **changes):
        steps = [dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=4)]
        runner = cls.from_cfg(config(
            f'refusals-{name}', iterations, work_dir=str(folder or tmp_path / name), **changes,
            model=dict(type='DMD2', student_every=1,
                       backbone=dict(type='SD3Backbone', pretrained='asset:digits/teacher')),
            optim_wrapper=dict(constructor='DistillationOptimWrapperConstructor',
                               student=wrapper(accumulative_counts=2), fake=wrapper(accumulative_counts=2)),
            param_scheduler=dict(student=steps, fake=steps)))
        runner.train()
        return runner.model.state_dict()

    plain = run('plain', Runner)
    one = run('flexible', FlexibleRunner, strategy=dict(type='SingleDeviceStrategy'))
    run('killed', FlexibleRunner, 4)
    resumed = run('resumed', FlexibleRunner, folder=tmp_path / 'killed', resume=True)
    for name, weight in plain.items():
        assert torch.equal(weight, one[name]) and torch.equal(weight, resumed[name]), name
