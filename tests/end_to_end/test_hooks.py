"""CDMHook against what MMEngine's runner does around it."""
import itertools
from types import SimpleNamespace

import pytest
import torch
from mmengine.registry import DATASETS
from tests_support import tiny_method
from torch.utils.data import IterableDataset

from cdm_plugin.draws import stream
from cdm_plugin.hooks import SampleGridHook
from cdm_plugin.roles.ema import StudentEMA


@DATASETS.register_module()
class StreamedLabels(IterableDataset):
    """An in-house dataset that cannot be indexed (MMEngine asks every dataset for a length)."""

    def __len__(self):
        return 1000

    def __iter__(self):
        return ({'prompt': i % 10} for i in itertools.count())


def ema_distance(method):
    """Largest difference between the EMA and the student's own weights."""
    return max((method.student_ema.weights[name] - p).abs().max().item()
               for name, p in method.student.named_parameters())


def test_resume_without_an_ema_starts_it_from_the_trained_student(short_run, tmp_path):
    short_run(iters=2, **{'custom_hooks.0.ema_decay': None}).train()
    assert 'student_ema' not in torch.load(tmp_path / 'run/iter_2.pth', weights_only=True)
    runner = short_run(iters=2, resume=True)
    runner.train()  # nothing is left to do
    assert ema_distance(runner.model) == 0


def test_validation_of_a_checkpoint_without_an_ema_uses_its_student(short_run, tmp_path):
    short_run(iters=2, **{'custom_hooks.0.ema_decay': None}).train()
    runner = short_run(
        iters=2, load_from=str(tmp_path / 'run/iter_2.pth'), work_dir=tmp_path / 'val', val_cfg=dict(),
        val_evaluator=dict(type='DigitMetric'), val_dataloader=dict(
            batch_size=5, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False),
            collate_fn=dict(type='default_collate'), dataset=dict(type='LabelDataset', num_classes=10)))
    seen = []
    sample = runner.model.sample
    runner.model.sample = lambda *args, **kwargs: (
        seen.append({k: v.clone() for k, v in runner.model.student.state_dict().items()}), sample(*args, **kwargs))[1]
    runner.val()
    saved = torch.load(tmp_path / 'run/iter_2.pth', weights_only=True)['state_dict']
    assert all(torch.equal(seen[0][k], saved[f'student.{k}']) for k in seen[0])


def test_resumed_run_without_a_seed_of_its_own_keeps_the_saved_one(short_run):
    first = short_run(iters=2, randomness=dict(seed=None))
    first.train()
    second = short_run(iters=3, randomness=dict(seed=None), resume=True)
    second.train()
    assert second.model.seed == first.seed == first.model.seed


def test_a_plain_optimizer_wrapper_names_the_constructor(short_run):
    runner = short_run(iters=1)
    runner.optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.1))
    runner.param_schedulers = None
    with pytest.raises(ValueError, match='DistillationOptimWrapperConstructor'):
        runner.train()


def test_a_streamed_dataset_trains_and_the_grid_asks_for_prompts(short_run, tmp_path):
    def loader():  # merging takes `_delete_` out of it
        return dict(batch_size=2, num_workers=0, sampler=None, collate_fn=dict(type='default_collate'),
                    dataset=dict(type='StreamedLabels'), _delete_=True)

    short_run(iters=2, train_dataloader=loader()).train()
    assert (tmp_path / 'run/iter_2.pth').is_file()
    with pytest.raises(ValueError, match='SampleGridHook.prompts'):
        short_run(iters=2, train_dataloader=loader(), **{'custom_hooks.1.prompts': None}).train()


def test_grids_by_step_count_stand_beside_the_first(short_run, tmp_path):
    """One step from noise, computed by hand: student and EMA x0 = noise - v(noise, 1), the teacher with guidance 2."""
    runner = short_run(iters=2, **{'custom_hooks.1.interval': 2, 'custom_hooks.1.steps': [1, 2],
                                   'custom_hooks.1.teacher_steps': 28})
    runner.train()
    images = {p.name for p in (tmp_path / 'run').glob('*/vis_data/vis_image/samples*')}
    assert images == {f'samples{grid}_{step}.png' for grid in ('', '_1_steps', '_2_steps') for step in (0, 2)}
    hook = next(h for h in runner.hooks if type(h).__name__ == 'SampleGridHook')
    rows, method = hook.rows(runner, 1), runner.model
    assert list(rows) == ['student, 1 step', 'EMA, 1 step', 'teacher, 1 step', 'teacher, 28 steps']
    noise = torch.randn(method.latent_shape(10), generator=stream(hook.seed, 'sample_grid'))
    condition, null = hook._get_condition(runner, method), method.null_condition(10)
    with torch.no_grad():
        own, given, without = (method.velocity(role, noise, torch.ones(10), c) for role, c in (
            ('student', condition), ('teacher', condition), ('teacher', null)))
        with method.student_ema.applied():
            averaged = method.velocity('student', noise, torch.ones(10), condition)
    for name, velocity in [('student, 1 step', own), ('EMA, 1 step', averaged),
                           ('teacher, 1 step', without + 2 * (given - without))]:
        torch.testing.assert_close(rows[name], method.backbone.codec.decode(noise - velocity), rtol=0, atol=1e-5)
    assert torch.equal(rows['teacher, 28 steps'], hook.rows(runner)['teacher, 28 steps'])
    assert hook.rows(runner, 2)['student, 2 steps'].shape == (10, 1, 16, 16)


def test_grids_of_no_steps_are_refused(short_run):
    with pytest.raises(ValueError, match=r'custom_hooks\[1\].steps\[1\] must be a whole number of 1 or more, but is 0'):
        short_run(iters=2, **{'custom_hooks.1.steps': [4, 0]})


def test_a_grid_has_a_row_of_every_role_that_makes_images(monkeypatch):
    """A method with a second fake score and a discriminator, both trained."""
    method = tiny_method()
    method.critic, method.head = tiny_method(seed=1).fake, torch.nn.Linear(2, 1)
    monkeypatch.setattr(type(method), 'trained_roles', ('fake', 'student', 'head', 'critic'))
    monkeypatch.setattr(type(method), 'denoisers', (*type(method).denoisers, 'critic'))
    method.student_ema = StudentEMA(method.student)
    runner = SimpleNamespace(model=method)
    hook = SampleGridHook(prompts=[0, 1], num_images=2, teacher_steps=3, steps=[2])
    rows = hook.rows(runner)
    assert list(rows) == ['student, 4 steps', 'EMA, 4 steps', 'teacher, 3 steps', 'fake score, 3 steps',
                          'critic, 3 steps']
    assert not torch.equal(rows['fake score, 3 steps'], rows['critic, 3 steps'])
    assert list(hook.rows(runner, 2)) == ['student, 2 steps', 'EMA, 2 steps', 'teacher, 2 steps', 'teacher, 3 steps']
    assert list(SampleGridHook(prompts=[0]).rows(SimpleNamespace(model=tiny_method('FlowMatching')))) == [
        'student, 4 steps']
