# 600 iterations (fake-score steps), 300 student steps with student_every=2.
optim_wrapper = dict(
    constructor='DistillationOptimWrapperConstructor',
    student=dict(
        type='OptimWrapper',
        optimizer=dict(type='AdamW', lr=2e-4, betas=(0.9, 0.999), weight_decay=1e-4),
        clip_grad=dict(max_norm=1.0)),
    fake=dict(
        type='OptimWrapper',
        optimizer=dict(type='AdamW', lr=4e-4, betas=(0.9, 0.999), weight_decay=1e-4),
        clip_grad=dict(max_norm=1.0)))
param_scheduler = dict(
    student=[dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=20)],
    fake=[dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=20)])
train_cfg = dict(type='IterBasedTrainLoop', max_iters=600)
