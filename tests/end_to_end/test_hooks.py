"""CDMHook against what MMEngine's runner does around it."""
import itertools

import pytest
import torch
from mmengine.registry import DATASETS
from torch.utils.data import IterableDataset


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
