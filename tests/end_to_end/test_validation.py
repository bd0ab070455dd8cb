"""MMEngine's ValLoop while a student trains."""
import evaluation_support  # noqa: F401  registers the metrics
import numpy as np
import pytest
import torch
from mmengine.dataset import DefaultSampler
from mmengine.runner import Runner
from PIL import Image
from recipes import CDM, shipped
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tests_support import same_bits

from cdm_plugin.config import load_config
from cdm_plugin.draws import stream
from cdm_plugin.metrics import prepare
from cdm_plugin.sheets import labelled_grid

COUNT = 12
METRICS = [dict(type='RecordingMetric'), dict(type='AbsentMetric'),
           dict(type='DigitMetric', reference='asset:digits/teacher_features.npz')]


def train(work_dir, **options):
    """A run of a few iterations without other pictures than the validation's; its runner and its log."""
    runner = Runner.from_cfg(load_config(CDM, {
        'train_cfg.max_iters': 4, 'train_cfg.val_interval': 2, 'train_dataloader.batch_size': 2,
        'val_dataloader.dataset.length': COUNT, 'val_dataloader.batch_size': 5, 'default_hooks.logger.interval': 1,
        'custom_hooks': [dict(type='CDMHook'), dict(type='ValidationGridHook')], 'work_dir': str(work_dir),
        'experiment_name': f'validation-{work_dir.name}', **options}))
    runner.train()
    return runner, next(work_dir.glob('*/*.log')).read_text()


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """Folder, runner and log of a run that validates after iterations 2 and 4."""
    folder = tmp_path_factory.mktemp('validation') / 'run'
    return folder, *train(folder, val_evaluator=METRICS)


def by_hand(method):
    """Images of the EMA student, from noise that depends on seed and place alone."""
    noise = torch.cat([torch.randn(method.latent_shape(1), generator=stream(0, 'sample', i)) for i in range(COUNT)])
    with method.student_ema.applied():
        return method.sample(method.backbone.condition(dict(prompt=torch.arange(COUNT) % 10)), noise)


def test_scalars_and_pictures_of_the_ema_student_are_in_tensorboard(run):
    root, runner, _ = run
    (folder,) = root.glob('*/vis_data')
    events = EventAccumulator(str(folder)).Reload()
    for name in ('digits/accuracy', 'digits/fd', 'images/mean'):
        assert [event.step for event in events.Scalars(name)] == [2, 4], name
    assert [event.step for event in events.Images('validation')] == [2, 4]
    assert 'images/absent' not in events.Tags()['scalars']
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


def test_a_missing_metric_is_reported_before_training_and_the_others_run(run):
    _, runner, log = run
    assert log.index('AbsentMetric is left out: AbsentMetric has no weights') < log.index('Iter(train)')
    assert [type(m).__name__ for m in runner.val_loop.evaluator.metrics] == ['RecordingMetric', 'DigitMetric']


def test_validation_repeats_itself_in_other_batches(run):
    _, runner, _ = run
    first = runner.val_loop.evaluator.metrics[0].judged.rows
    runner.val_loop.dataloader.batch_sampler.batch_size = 4
    assert runner.val_loop.run()['images/count'] == COUNT
    assert torch.allclose(runner.val_loop.evaluator.metrics[0].judged.rows, first, atol=1e-5)


def test_validation_changes_no_training_and_goes_on_without_a_metric(run, tmp_path):
    """A run that validates once, with no metric left, against one that does so twice."""
    train(tmp_path / 'other', val_evaluator=dict(type='AbsentMetric', _delete_=True), **{'train_cfg.val_interval': 3})
    assert {p.name for p in tmp_path.rglob('validation_*.png')} == {'validation_3.png', 'validation_4.png'}
    a, b = (torch.load(folder / 'iter_4.pth', weights_only=True) for folder in (run[0], tmp_path / 'other'))
    for part in ('state_dict', 'student_ema', 'optimizer'):
        same_bits(a[part], b[part], part)


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
