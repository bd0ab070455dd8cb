# All of Acme's parts in one training. The plug-in needs no import line: cdm_plugin finds it.
custom_imports = dict(imports=['cdm_plugin'])
model = dict(
    type='DMD2',
    student_every=2,
    backbone=dict(
        type='AcmeBackbone', config=dict(cross_attention_dim=8),
        conditioner=dict(type='ClassConditioner', num_classes=3), codec=dict(type='PixelCodec', scale=2)),
    losses=dict(
        reward=dict(type='AcmeRewardLoss', weight=0.1),
        gan=dict(type='AcmeGANLoss', weight=0.5)))
optim_wrapper = dict(
    constructor='DistillationOptimWrapperConstructor',
    student=dict(optimizer=dict(type='AdamW', lr=1e-2)),
    fake=dict(optimizer=dict(type='AdamW', lr=1e-2)),
    discriminator=dict(optimizer=dict(type='AdamW', lr=3e-2)))
train_dataloader = dict(
    batch_size=2, num_workers=0, sampler=dict(type='InfiniteSampler', shuffle=True),
    collate_fn=dict(type='default_collate'), dataset=dict(type='AcmePictures'))
train_cfg = dict(type='IterBasedTrainLoop', max_iters=4)
custom_hooks = [dict(type='CDMHook')]
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=1, log_metric_by_epoch=False),
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=4))
log_processor = dict(by_epoch=False)
randomness = dict(seed=0)
work_dir = 'work_dirs/acme'
