custom_hooks = [
    dict(ema_decay=0.9, type='CDMHook'),
]
default_hooks = dict(
    checkpoint=dict(
        by_epoch=False, interval=4, max_keep_ckpts=-1, type='CheckpointHook'),
    logger=dict(interval=1, log_metric_by_epoch=False, type='LoggerHook'))
default_scope = 'mmengine'
experiment_name = 'run'
log_level = 'WARNING'
log_processor = dict(by_epoch=False, window_size=1)
model = dict(
    anchor_aware_fake=True,
    backbone=dict(
        codec=dict(scale=2, type='PixelCodec'),
        conditioner=dict(num_classes=3, type='ClassConditioner'),
        config=dict(
            attention_head_dim=8,
            caption_projection_dim=16,
            in_channels=4,
            joint_attention_dim=8,
            num_attention_heads=2,
            num_layers=2,
            out_channels=4,
            patch_size=2,
            pooled_projection_dim=4,
            pos_embed_max_size=4,
            sample_size=4),
        scheduler=dict(shift=3.0),
        type='SD3Backbone'),
    fake_merge=0.05,
    time_grid=dict(max_steps=6),
    type='CDM')
optim_wrapper = dict(
    constructor='DistillationOptimWrapperConstructor',
    fake=dict(
        accumulative_counts=1,
        clip_grad=dict(max_norm=0.5),
        optimizer=dict(eps=0.0001, lr=0.01, type='AdamW')),
    student=dict(
        accumulative_counts=1,
        clip_grad=dict(max_norm=0.5),
        optimizer=dict(eps=0.0001, lr=0.01, type='AdamW')))
param_scheduler = dict(
    fake=[
        dict(begin=0, by_epoch=False, end=4, factor=0.5, type='ConstantLR'),
    ],
    student=[
        dict(
            begin=0, by_epoch=False, end=10, start_factor=0.1,
            type='LinearLR'),
    ])
randomness = dict(seed=0)
train_cfg = dict(max_iters=4, type='IterBasedTrainLoop')
train_dataloader = dict(
    batch_size=4,
    dataset=dict(length=24, num_classes=3, type='LabelDataset'),
    num_workers=0,
    sampler=dict(shuffle=False, type='InfiniteSampler'))
work_dir = 'run'
