"""A training by epochs, with the habits of MMEngine that docs/mmengine.md says work."""
import evaluation_support  # noqa: F401  registers the metrics
import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from tests_support import same_bits, tiny_backbone


def run(work_dir, epochs, resume=False):
    labels = dict(type='LabelDataset', num_classes=3, length=4)
    loader = dict(batch_size=2, num_workers=0, collate_fn=dict(type='default_collate'), dataset=labels)
    role = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-3))
    Runner.from_cfg(Config(dict(
        model=dict(type='CDM', backbone=tiny_backbone(), student_every=2),
        optim_wrapper=dict(constructor='DistillationOptimWrapperConstructor', student=role, fake=role),
        param_scheduler=[dict(type='LinearLR', start_factor=0.1, by_epoch=True, end=2)],
        train_dataloader=dict(loader, sampler=dict(type='DefaultSampler', shuffle=True)),
        val_dataloader=dict(loader, sampler=dict(type='DefaultSampler', shuffle=False)),
        val_evaluator=dict(type='RecordingMetric'), val_cfg=dict(),
        train_cfg=dict(type='EpochBasedTrainLoop', max_epochs=epochs, val_interval=1),
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', save_best='images/mean', rule='greater')),
        custom_hooks=[dict(type='CDMHook'), dict(type='EmptyCacheHook'),
                      dict(type='EarlyStoppingHook', monitor='images/mean', rule='greater')],
        randomness=dict(seed=0), log_level='ERROR', work_dir=str(work_dir), default_scope='mmengine', resume=resume,
        experiment_name=f'{work_dir.name}-{epochs}'))).train()
    return torch.load(work_dir / f'epoch_{epochs}.pth', weights_only=True)


@pytest.mark.slow
def test_epochs_train_keep_the_best_and_resume_to_the_bit(tmp_path):
    whole = run(tmp_path / 'whole', 3)
    assert len(list((tmp_path / 'whole').glob('best_images_mean_epoch_*.pth'))) == 1
    run(tmp_path / 'resumed', 2)
    resumed = run(tmp_path / 'resumed', 3, resume=True)
    for key in ('state_dict', 'optimizer', 'param_schedulers'):
        same_bits(whole[key], resumed[key])
