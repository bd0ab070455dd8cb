"""The hooks of which CDMHook consists, each alone and together, in runs of a few iterations."""
import copy
import json
import pickle
from types import SimpleNamespace

import evaluation_support  # noqa: F401  registers RecordingMetric
import pytest
import torch
from mmengine.dataset import DefaultSampler, InfiniteSampler
from mmengine.hooks import Hook, RuntimeInfoHook
from mmengine.registry import HOOKS
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tests_support import same_bits, tiny_method
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from cdm_plugin.hooks import ConfigCheckHook, DataCheckHook, StudentEMAHook, data_check_hook
from cdm_plugin.hooks.data_check_hook import batch_size_of, check_batches
from cdm_plugin.hooks.hook_group import HookGroup

CDM = dict(type='CDMHook', ema_decay=0.5, histogram_interval=3)
PARTS = [dict(type='ConfigCheckHook'), dict(type='LoadCheckHook'), dict(type='IterationHook'),
         dict(type='SignalHook'), dict(type='PrecisionHook'),
         dict(type='StudentEMAHook', ema_decay=0.5), dict(type='ValidationHook'), dict(type='DataCheckHook'),
         dict(type='ScalarsHook'), dict(type='AnchorHistogramHook', interval=3), dict(type='NonFiniteHook'),
         dict(type='CollapseWatchHook'), dict(type='PlainCheckpointHook')]
ITERATION, SCALARS = dict(type='IterationHook'), dict(type='ScalarsHook')
LOADER = dict(batch_size=2, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False),
              collate_fn=dict(type='default_collate'),
              dataset=dict(type='LabelDataset', num_classes=10, length=4, serialize_data=False))
JUDGED = {'val_evaluator': [dict(type='RecordingMetric')], 'val_dataloader': LOADER}


@HOOKS.register_module()
class NoteHook(Hook):
    """A hook of a team's own: notes what it is given and what it finds on the method in every iteration."""

    def __init__(self):
        self.notes = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        method = runner.model
        self.notes.append(SimpleNamespace(
            outputs=outputs, iteration=method.iteration, dtype=method.autocast_dtype, anchors=method.anchor_sigma,
            updated=method.student_updated, weights=[p.detach().double().clone() for p in method.student.parameters()]))


@HOOKS.register_module()
class NaNGuardHook(Hook):
    """The guard that many projects have."""
    priority = 'VERY_HIGH'

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        for name, value in outputs.items():
            if not torch.as_tensor(value).isfinite().all():
                raise FloatingPointError(f'{name} in iteration {runner.iter}')


@HOOKS.register_module()
class DoublingInfoHook(RuntimeInfoHook):
    """A team's own history: twice the scalars."""

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        super().after_train_iter(runner, batch_idx, outputs={k: 2 * v for k, v in outputs.items()})


class Reads(TorchDispatchMode):
    """Counts how often Python asks a tensor for its number."""
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.fixture
def run(short_run, tmp_path):
    """Builds a runner with these hooks alone, which logs and saves at its end: run(*hooks, name=..., **options)."""

    def build(*hooks, name='run', iters=2, **options):
        return short_run(iters=iters, work_dir=tmp_path / name, **copy.deepcopy({
            'custom_hooks': list(hooks), 'train_dataloader.batch_size': 2, 'default_hooks.logger.interval': 100,
            'train_cfg.val_interval': 100, 'default_hooks.checkpoint.interval': 100, 'model.time_grid.max_steps': 2,
            'model.student_every': 1, 'train_dataloader.dataset.serialize_data': False, **JUDGED, **options}))

    return build


def train(runner):
    """Trains, and returns what the NoteHook has seen."""
    torch.manual_seed(0)
    runner.train()
    return next((hook.notes for hook in runner.hooks if isinstance(hook, NoteHook)), None)


def history(runner, name):
    return runner.message_hub.get_scalar(name).data[0].tolist()


def without_times(record):
    return {k: v for k, v in record.items() if 'time' not in k}


def test_cdm_hook_is_its_parts_one_by_one(run, tmp_path):
    """The same checkpoints, in the middle and at the end, the same log and the same validation."""
    states, lines, judged = [], [], []
    for name, hooks in (('group', [CDM]), ('parts', PARTS)):
        runner = run(*hooks, name=name, iters=5, **{'train_cfg.val_interval': 2, 'default_hooks.logger.interval': 2,
                                                    'default_hooks.checkpoint.interval': 3})
        train(runner)
        states.append([torch.load(tmp_path / name / f'iter_{i}.pth', weights_only=True) for i in (3, 5)])
        log = next((tmp_path / name).glob('*/vis_data/scalars.json')).read_text()
        lines.append([without_times(json.loads(line)) for line in log.splitlines()])
        judged.append(runner.val_loop.evaluator.metrics[0].judged.rows)
    assert len(lines[0]) == 5 and lines[0] == lines[1]
    assert torch.equal(*judged)
    for group, parts in zip(*states):
        assert list(group) == list(parts)
        for key in ('state_dict', 'student_ema', 'optimizer', 'param_schedulers'):
            same_bits(group[key], parts[key])
        own, other = (without_times(state['message_hub']['log_scalars']) for state in (group, parts))
        assert list(own) == list(other)
        same_bits(own, other)


def test_a_group_hands_on_every_call_in_order():
    calls = []

    def member(name):
        return type(name, (Hook,), {stage: lambda self, *args, stage=stage, **kwargs: calls.append(
            (name, stage, args, kwargs)) for stage in Hook.stages})()

    group = HookGroup([member('a'), member('b')])
    for stage in Hook.stages:
        calls.clear()
        getattr(group, stage)('runner', batch_idx=3)
        assert calls == [(name, stage, ('runner',), dict(batch_idx=3)) for name in 'ab']
    assert set(HookGroup([StudentEMAHook(), ConfigCheckHook()]).get_triggered_stages()) == {
        'before_run', 'before_train', 'after_train_iter', 'before_val_epoch', 'after_val_epoch', 'before_test_epoch',
        'after_test_epoch', 'before_save_checkpoint', 'after_load_checkpoint'}


def test_a_job_that_two_hooks_would_do_is_refused(run):
    with pytest.raises(ValueError, match='StudentEMAHook twice: CDMHook contains it'):
        run(CDM, dict(type='StudentEMAHook')).train()


def test_iteration_hook_alone_trains(run):
    alone, whole = run(ITERATION, dict(type='NoteHook'), name='alone'), run(CDM, name='whole')
    assert [note.iteration for note in train(alone)] == [0, 1]
    train(whole)
    same_bits(dict(alone.model.state_dict()), dict(whole.model.state_dict()))
    assert alone.model.student_ema is None


def test_without_it_the_missing_hook_is_named(run):
    with pytest.raises(ValueError, match="does not know the iteration: add dict\\(type='CDMHook'\\) to custom_hooks"):
        run(*(part for part in PARTS if part != ITERATION)).train()


def test_precision_hook_lets_networks_sample_as_they_train(run):
    amp = {f'optim_wrapper.{role}.{k}': v for role in ('student', 'fake')
           for k, v in dict(type='AmpOptimWrapper', dtype='bfloat16').items()}
    for hook, dtype in ((dict(type='PrecisionHook'), torch.bfloat16), (SCALARS, None)):
        runner = run(ITERATION, hook, dict(type='NoteHook'), iters=1, **amp)
        assert train(runner)[0].dtype is dtype
        assert runner.model.autocast_dtype is None


def test_student_ema_hook_averages_the_students_steps(run, tmp_path):
    """Against the recursion in float64."""
    note = dict(type='NoteHook')
    runner = run(ITERATION, dict(type='StudentEMAHook', ema_decay=0.25), note, iters=5)
    average = [p.detach().double().clone() for p in runner.model.student.parameters()]
    for k, seen in enumerate(train(runner), 1):
        assert seen.updated
        decay = min((1 + k) / (10 + k), 0.25)  # 2/11, 3/12, then the limit
        average = [decay * a + (1 - decay) * w for a, w in zip(average, seen.weights)]
    saved = torch.load(tmp_path / 'run/iter_5.pth', weights_only=False)['student_ema']
    assert saved['steps'] == 5
    for own, expected in zip(saved['weights'].values(), average):
        torch.testing.assert_close(own.double(), expected, rtol=0, atol=1e-6)


def test_a_test_after_training_judges_the_average(run):
    runner = run(CDM, iters=4, test_cfg=dict(), test_evaluator=JUDGED['val_evaluator'], test_dataloader=LOADER)
    train(runner)
    before = copy.deepcopy(runner.model.student.state_dict())
    runner.test()
    judged = runner.test_loop.evaluator.metrics[0].judged.rows
    method, labels = runner.model, torch.arange(4)

    def images():
        return method.sample(method.backbone.condition(dict(prompt=labels)), method.noise(0, labels.tolist()))

    with method.student_ema.applied():
        averaged = images()
    torch.testing.assert_close(judged, averaged.clamp(-1, 1).flatten(1), rtol=0, atol=1e-5)
    assert (judged - images().clamp(-1, 1).flatten(1)).abs().max() > 1e-3
    same_bits(dict(before), dict(method.student.state_dict()))


def test_mmengines_ema_hook_beside_it_is_refused(run):
    for hooks, start in (([dict(type='EMAHook'), CDM], 'train'), ([CDM, dict(type='EMAHook')], 'val')):
        with pytest.raises(ValueError, match='remove EMAHook, or set ema_decay=None of CDMHook'):
            getattr(run(*hooks), start)()


def test_mmengines_ema_hook_alone_leaves_the_live_student_as_it_is(run, tmp_path):
    """With ema_decay=None; its validations, and what it saves, are those of MMEngine's average."""
    off = dict(type='CDMHook', ema_decay=None)
    runner = run(off, dict(type='EMAHook', momentum=0.5), iters=4, **{'train_cfg.val_interval': 2})
    plain = run(off, name='plain', iters=4)
    train(runner), train(plain)
    same_bits(dict(runner.model.state_dict()), dict(plain.model.state_dict()))
    state = torch.load(tmp_path / 'run/iter_4.pth', weights_only=True)
    assert 'student_ema' not in state
    average = runner.hooks[[type(hook).__name__ for hook in runner.hooks].index('EMAHook')].ema_model.module
    same_bits(dict(state['state_dict']), dict(average.state_dict()))
    images = average.sample(average.backbone.condition(dict(prompt=torch.arange(4))), average.noise(0, range(4)))
    judged = runner.val_loop.evaluator.metrics[0].judged.rows
    torch.testing.assert_close(judged, images.clamp(-1, 1).flatten(1), rtol=0, atol=1e-5)


def test_validation_hook_counts_from_the_first_sample(run):
    judged = []
    for hooks in ([ITERATION, dict(type='ValidationHook')], [ITERATION]):
        runner = run(*hooks)
        for _ in range(2):
            runner.val()
            judged.append(runner.val_loop.evaluator.metrics[0].judged.rows)
    assert torch.equal(judged[0], judged[1])
    assert not torch.equal(judged[2], judged[3])  # without it the noise goes on


def test_data_check_hook_finds_an_empty_dataset():
    runner = SimpleNamespace(train_dataloader=SimpleNamespace(dataset=[]), model=tiny_method())
    with pytest.raises(ValueError, match='train_dataloader.dataset is empty: check its ann_file'):
        DataCheckHook().before_train(runner)


def test_data_check_hook_finds_embeddings_of_another_text_encoder():
    sample = dict(condition=dict(encoder_hidden_states=torch.zeros(2, 9), pooled_projections=torch.zeros(4)))
    runner = SimpleNamespace(train_dataloader=DataLoader([sample]), model=tiny_method())
    with pytest.raises(ValueError, match='have width 9, but the network .* expects 8'):
        DataCheckHook().before_train(runner)


def loader(samples, sampler=DefaultSampler, drop_last=False, **kwargs):
    return DataLoader(range(samples), batch_size=4, sampler=sampler(range(samples), **kwargs), drop_last=drop_last)


def test_data_check_hook_finds_an_epoch_without_a_batch():
    check_batches(loader(3))
    check_batches(loader(3, InfiniteSampler, drop_last=True))  # which begins again
    with pytest.raises(ValueError, match=r'no batch of its 3 samples a rank: lower train_dataloader.batch_size=4, or '
                                         'set drop_last=False'):
        check_batches(loader(3, drop_last=True))


def test_data_check_hook_finds_loaders_of_other_lengths(monkeypatch):
    """Two ranks, of which the other has one sample fewer of nine."""
    monkeypatch.setattr(data_check_hook, 'get_world_size', lambda: 2)
    monkeypatch.setattr(data_check_hook, 'all_gather_object', lambda own: [own, len(loader(4))])
    check_batches(loader(4))
    with pytest.raises(ValueError, match=r'as many batches of train_dataloader, .* \[2, 1\].*round_up=True'):
        check_batches(loader(5, round_up=False))


def test_data_check_hook_compares_batch_sizes_at_once_and_then_now_and_then(monkeypatch):
    """Two ranks: the other's batches have 2 samples, but for one."""
    messages = []

    def gather(own):
        messages.append(list(own))
        other = [2] * len(own)
        if len(messages) == 3:
            other[7] = 1
        return [own, other]

    monkeypatch.setattr(data_check_hook, 'get_world_size', lambda: 2)
    monkeypatch.setattr(data_check_hook, 'all_gather_object', gather)
    hook = DataCheckHook()
    with pytest.raises(ValueError, match=r'same train_dataloader.batch_size, .* batches of \[2, 1\] samples'):
        for i in range(1000):
            runner = SimpleNamespace(iter=i, max_iters=1000)
            hook.before_train_iter(runner, i, dict(prompt=torch.zeros(2)))
            hook.after_train_iter(runner, i)
    assert i + 1 == 100 and [len(message) for message in messages] == [1, 49, 50]


@pytest.mark.parametrize('batch', [torch.zeros(3, 2), [{}, {}, {}], dict(a=torch.zeros(3), b=torch.zeros(3, 2)),
                                   dict(condition=dict(x=torch.zeros(3, 7, 2)))])
def test_batch_sizes_of_either_collate_function(batch):
    assert batch_size_of(batch) == 3


def test_every_hook_sees_the_scalars_and_the_log_has_their_values(run, tmp_path):
    early, late = dict(type='NoteHook', priority='HIGHEST'), dict(type='NoteHook', priority='LOWEST')
    runner = run(ITERATION, SCALARS, early, late, iters=4, **{'model.student_every': 2})
    train(runner)
    first, last = ([note.outputs for note in hook.notes] for hook in runner.hooks if isinstance(hook, NoteHook))
    for i, (a, b) in enumerate(zip(first, last)):
        assert a.keys() == b.keys() and all(a[k] is b[k] for k in a)
        assert ('loss_student' in a) == (i % 2 == 1)
        assert all(isinstance(a[k], torch.Tensor) for k in a if k.startswith('loss'))
    for name in ('loss_fake', 'anchor_sigma', 'calls_teacher'):
        values = [float(outputs[name]) for outputs in first if name in outputs]
        assert len(values) >= 2 and history(runner, f'train/{name}') == values
    assert not any('after_train_iter' in vars(hook) for hook in runner.hooks)


def test_a_guard_of_the_teams_own_stops_at_the_first_nan(run):
    runner = run(CDM, dict(type='NaNGuardHook'))
    with torch.no_grad():
        next(runner.model.fake.parameters()).fill_(float('nan'))
    with pytest.raises(FloatingPointError, match='loss_fake in iteration 0'):
        runner.train()


@pytest.mark.parametrize('hook, expected', [(SCALARS, [0, 0, 0, 0, 0]), (None, None)], ids=['with', 'without'])
def test_nothing_waits_for_the_device_until_scalars_are_due(run, hook, expected):
    """They go to the host in one copy. Without the hook MMEngine reads each alone, so the count does count."""
    runner = run(ITERATION, *[hook] * (hook is not None), iters=5, **{'default_hooks.logger.interval': 3})
    reads, call_hook = [], runner.call_hook

    def counted(point, **kwargs):
        with Reads() as mode:
            call_hook(point, **kwargs)
        if point == 'after_train_iter':
            reads.append(mode.count)

    runner.call_hook = counted
    train(runner)
    assert len(reads) == 5
    assert reads == expected if expected else min(reads) > 5, reads
    assert len(history(runner, 'train/loss_fake')) == 5


def test_a_teams_own_runtime_info_keeps_its_say(run):
    runner = run(ITERATION, SCALARS, dict(type='NoteHook'),
                 **{'default_hooks.runtime_info': dict(type='DoublingInfoHook')})
    notes = train(runner)
    assert history(runner, 'train/loss_fake') == [2 * float(note.outputs['loss_fake']) for note in notes]


def test_anchor_histogram_hook_draws_all_anchors_of_its_interval(run, tmp_path):
    runner = run(ITERATION, dict(type='AnchorHistogramHook', interval=2), dict(type='NoteHook'), iters=5)
    anchors = [note.anchors.double() for note in train(runner)]
    events = EventAccumulator(str(next((tmp_path / 'run').glob('*/vis_data'))), dict(histograms=0)).Reload()
    drawn = events.Histograms('train/anchor_sigma_histogram')
    assert [event.step for event in drawn] == [2, 4]
    for event, pair in zip(drawn, (anchors[:2], anchors[2:4])):
        assert event.histogram_value.num == 4
        assert event.histogram_value.sum == pytest.approx(float(torch.cat(pair).sum()), rel=1e-6)


def test_anchor_histogram_hook_names_its_interval():
    with pytest.raises(ValueError, match=r'CDMHook.histogram_interval must be a whole number of 1 or more, but is 0'):
        HOOKS.build(dict(type='CDMHook', histogram_interval=0))


def test_plain_checkpoint_hook_makes_them_safe_to_load_and_to_resume(run, tmp_path):
    run(ITERATION, name='stock').train()
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / 'stock/iter_2.pth', weights_only=True)
    hooks = [ITERATION, dict(type='PlainCheckpointHook')]
    run(*hooks).train()
    state = torch.load(tmp_path / 'run/iter_2.pth', weights_only=True)
    assert state['config']['train_cfg']['max_iters'] == 2 and 'student_ema' not in state
    resumed = run(*hooks, iters=3, resume=True)
    resumed.train()
    assert len(history(resumed, 'train/loss_fake')) == 3


def test_config_check_hook_warns_of_accumulated_gradients_at_a_checkpoint(run, tmp_path):
    options = {'optim_wrapper.student.accumulative_counts': 2, 'model.student_every': 2, 'log_level': 'WARNING'}
    for interval, warned in ((6, True), (8, False)):
        run(ITERATION, dict(type='ConfigCheckHook'), name=f'every{interval}', iters=1,
            **{'default_hooks.checkpoint.interval': interval}, **options).train()
        log = next((tmp_path / f'every{interval}').glob('*/*.log')).read_text()
        assert (f'interval={interval} is no multiple of 4' in log) == warned
