"""MMEngine's ValLoop while a student trains."""
import evaluation_support  # noqa: F401  registers the metrics
import numpy as np
import pytest
import torch
from mmengine.dataset import DefaultSampler
from PIL import Image
from recipes import CDM, shipped
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tests_support import same_bits

from cdm_plugin.config import load_config
from cdm_plugin.draws import stream
from cdm_plugin.evaluation import prepare
from cdm_plugin.images import labelled_grid

COUNT = 12
METRICS = [dict(type='RecordingMetric'), dict(type='AbsentMetric'),
           dict(type='DigitMetric', reference='asset:digits/teacher_features.npz')]


@pytest.fixture
def validated(short_run, tmp_path):
    """A run of 4 iterations that validates after 2 and 4, and its log."""
    runner = short_run(iters=4, val_evaluator=METRICS, **{
        'train_cfg.val_interval': 2, 'val_dataloader.dataset.length': COUNT, 'val_dataloader.batch_size': 5})
    runner.train()
    return runner, next((tmp_path / 'run').glob('*/*.log')).read_text()


def by_hand(method):
    """Images of the EMA student, from noise that depends on seed and place alone."""
    noise = torch.cat([torch.randn(method.latent_shape(1), generator=stream(0, 'sample', i)) for i in range(COUNT)])
    with method.student_ema.applied():
        return method.sample(method.backbone.condition(dict(prompt=torch.arange(COUNT) % 10)), noise)


def test_scalars_and_pictures_of_the_ema_student_are_in_tensorboard(validated, tmp_path):
    runner, log = validated
    (folder,) = (tmp_path / 'run').glob('*/vis_data')
    events = EventAccumulator(str(folder)).Reload()
    for name in ('digits/accuracy', 'digits/fd', 'images/mean'):
        assert [event.step for event in events.Scalars(name)] == [2, 4], name
    assert [event.step for event in events.Images('validation')] == [2, 4]
    assert 'images/absent' not in events.Tags()['scalars']
    recorded, _, digits = METRICS
    metric = runner.val_loop.evaluator.metrics[0]
    expected = by_hand(runner.model)
    judged = metric.judged
    assert torch.allclose(judged.rows, expected.clamp(-1, 1).flatten(1), atol=1e-5)
    assert judged.index.tolist() == list(range(COUNT)) and judged.prompts == [i % 10 for i in range(COUNT)]
    assert events.Scalars('images/mean')[-1].value == pytest.approx(float(expected.clamp(-1, 1).mean()), abs=1e-5)
    with Image.open(folder / 'vis_image/validation_4.png') as image:
        sheet = np.asarray(image)
    grid = labelled_grid({'0 - 7': expected[:8], '8 - 11': expected[8:]})
    assert sheet.shape == grid.shape and (sheet != grid).mean() < 1e-3


def test_a_missing_metric_is_reported_before_training_and_the_others_run(validated):
    runner, log = validated
    assert log.index('AbsentMetric is left out: AbsentMetric has no weights') < log.index('Iter(train)')
    assert [type(m).__name__ for m in runner.val_loop.evaluator.metrics] == ['RecordingMetric', 'DigitMetric']


def test_validation_repeats_itself_and_changes_no_training(validated, short_run, tmp_path):
    runner, _ = validated
    runner.val_loop.dataloader.batch_sampler.batch_size = 4
    first = runner.val_loop.evaluator.metrics[0].judged.rows
    metrics = runner.val_loop.run()
    assert metrics['images/count'] == COUNT
    assert torch.allclose(runner.val_loop.evaluator.metrics[0].judged.rows, first, atol=1e-5)
    without = short_run(iters=4, work_dir=tmp_path / 'without', **{'train_cfg.val_interval': 100})
    without.val_loop.run = lambda: None
    without.train()
    a, b = (torch.load(tmp_path / name / 'iter_4.pth', weights_only=True) for name in ('run', 'without'))
    for part in ('state_dict', 'student_ema', 'optimizer'):
        same_bits(a[part], b[part], part)


def test_without_any_metric_left_the_pictures_remain(short_run, tmp_path):
    short_run(iters=2, val_evaluator=dict(type='AbsentMetric', _delete_=True)).train()
    assert list((tmp_path / 'run').glob('*/vis_data/vis_image/validation_2.png'))


def test_an_unknown_metric_is_found_in_the_config():
    with pytest.raises(ValueError, match="val_evaluator.type='DigitMetrik' is not registered; did you mean 'Digit"):
        load_config(CDM, {'val_evaluator.type': 'DigitMetrik'})


def test_unequal_shares_are_refused(monkeypatch):
    monkeypatch.setattr(prepare, 'get_world_size', lambda: 2)
    monkeypatch.setattr(prepare, 'all_gather_object', lambda own: [own, own - 1])
    loader = torch.utils.data.DataLoader(range(5), sampler=DefaultSampler(range(5), shuffle=False, round_up=False))
    with pytest.raises(ValueError, match=r'of val_dataloader, but they have \[5, 4\].*round_up=True'):
        prepare.check_shares(loader, 'val_dataloader')


@pytest.mark.parametrize('recipe', [name for name in shipped() if name.startswith('digits/')])
def test_the_digits_recipes_validate(recipe):
    cfg = load_config(recipe)
    assert cfg.val_evaluator.type == 'DigitMetric' and cfg.val_dataloader.dataset.length == 200
    assert cfg.train_cfg.max_iters >= 3 * cfg.train_cfg.val_interval
    assert cfg.custom_hooks[2].type == 'ValidationGridHook'
