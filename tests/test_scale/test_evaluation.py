"""Validation and `cdm evaluate` on two gloo processes against one."""
from pathlib import Path

import evaluation_support  # noqa: F401  registers the metrics
import pytest
import torch
from mmengine.runner import Runner
from PIL import Image
from recipes import CDM
from scale_support import Workers, init_gloo, launch, run_command

pytest.importorskip('deepspeed', reason='needs DeepSpeed, which the extra `test` installs')

from deepspeed_support import STRATEGIES, build, config  # noqa: E402
from tests_support import same_bits  # noqa: E402

from cdm_plugin.cli import main  # noqa: E402
from cdm_plugin.config import load_config  # noqa: E402

COUNT = 5  # over two ranks one sample is there twice


def validation(**sampler):
    """Settings of a short validation, one metric of which lacks its weights on the second rank."""
    return dict(
        val_cfg=dict(), val_evaluator=[dict(type='AbsentMetric', rank=1), dict(type='RecordingMetric')],
        val_dataloader=dict(batch_size=2, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False, **sampler),
                            dataset=dict(type='LabelDataset', num_classes=3, length=COUNT)),
        custom_hooks=[dict(type='CDMHook', ema_decay=0.9), dict(type='ValidationGridHook')])


def train_and_validate(runner):
    """Values and judged images of a run's last validation."""
    runner.train()
    metric = runner.val_loop.evaluator.metrics[-1]
    values = runner.val_loop.run()
    judged = metric.judged
    return dict(values=values, names=[type(m).__name__ for m in runner.val_loop.evaluator.metrics],
                rows=None if judged is None else judged.rows, index=None if judged is None else judged.index.tolist())


def data_parallel(folder, launcher, **sampler):
    """The digits recipe; its learning rate is 0, so that the number of processes does not change the weights."""
    cfg = load_config(CDM, {
        'train_cfg.max_iters': 2, 'train_dataloader.batch_size': 2, 'work_dir': str(folder), 'launcher': launcher,
        'log_level': 'WARNING', 'experiment_name': Path(folder).name + launcher,
        'optim_wrapper.student.optimizer.lr': 0.0, 'optim_wrapper.student.optimizer.weight_decay': 0.0})
    cfg.merge_from_dict(validation(**sampler))
    if launcher != 'none':
        cfg.model_wrapper_cfg = dict(type='DistillationDataParallel')
    return Runner.from_cfg(cfg)


def sharded(folder, world_size, rank, strategy=None):
    """The tiny SD3 of the DeepSpeed tests."""
    cfg = config(folder, world_size, iters=2, strategy=strategy)
    cfg.merge_from_dict(validation())
    return build(cfg, world_size, rank)


def validate_in_all_ways(folder):
    """One process of two."""
    rank = init_gloo()
    results = dict(ddp=train_and_validate(data_parallel(f'{folder}/ddp', 'pytorch')))
    unequal = data_parallel(f'{folder}/unequal', 'pytorch', round_up=False)
    try:
        unequal.train()
    except ValueError as error:
        results['unequal'] = str(error)
    results['zero3'] = train_and_validate(sharded(f'{folder}/zero3', 2, rank, STRATEGIES['stage3']))
    return results


@pytest.fixture(scope='module')
def both(tmp_path_factory):
    """Folder and the results of two processes."""
    folder = tmp_path_factory.mktemp('validation')
    return folder, launch(validate_in_all_ways, str(folder))


@pytest.mark.parametrize('way', ['ddp', 'zero3'])
def test_two_ranks_judge_the_images_of_one_process(both, way, tmp_path):
    _, (first, second) = both
    alone = train_and_validate(data_parallel(tmp_path / way, 'none') if way == 'ddp' else sharded(tmp_path, 1, 0))
    single = dict(alone, values={k: v for k, v in alone['values'].items() if k != 'images/absent'})
    assert len(alone['values']) == 3  # one process lacks no metric
    assert single['index'] == first[way]['index'] == list(range(COUNT))
    assert torch.allclose(first[way]['rows'], single['rows'], rtol=0, atol=1e-4)
    assert not torch.allclose(single['rows'][0], single['rows'][3], atol=0.1)  # the same label, other noise
    for rank in (first, second):
        assert rank[way]['values'] == pytest.approx(single['values'], abs=1e-4)
        assert rank[way]['names'] == ['RecordingMetric'] and 'images/absent' not in rank[way]['values']


def test_one_grid_is_written_of_the_images_of_both_ranks(both):
    folder, _ = both
    (picture,) = folder.glob('ddp/*/vis_data/vis_image/validation_2.png')
    with Image.open(picture) as image:
        assert image.height == 50 and image.width > COUNT * 50


def test_ranks_with_unequal_shares_stop_before_training(both):
    for rank in both[1]:
        assert 'they have [3, 2]' in rank['unequal'] and 'val_dataloader.sampler' in rank['unequal']


def test_two_processes_evaluate_to_the_bits_of_one(tmp_path):
    (tmp_path / 'labels.txt').write_text('\n'.join(str(i % 10) for i in range(23)))
    (tmp_path / 'metrics.py').write_text("metrics = [dict(type='DigitMetric')]")

    def command(out):
        return ['evaluate', f'cdm={CDM}', '--teacher', '--teacher-steps', '1', '--steps', '1', '--prompts',
                str(tmp_path / 'labels.txt'), '--metrics', str(tmp_path / 'metrics.py'), '--out', str(out)]

    assert main(command(tmp_path / 'one')) == 0
    with Workers(run_command, [*command(tmp_path / 'two'), '--launcher', 'pytorch']) as workers:
        assert workers.wait(120) == [0, 0], workers.text()
    one, two = ({str(p.relative_to(tmp_path / name)): p.read_bytes() for p in (tmp_path / name).rglob('*')
                 if p.suffix in ('.png', '.json', '.md')} for name in ('one', 'two'))
    assert len(one) > 2 * 23
    same_bits(one, two)
