# 4,000 iterations (fake-score steps), 2,000 student steps with student_every=2; beta1 = 0 as on the digits. A longer
# run needs the `end` of its schedules changed with max_iters.
optim_wrapper = dict(
    constructor='DistillationOptimWrapperConstructor',
    student=dict(
        type='AmpOptimWrapper',
        dtype='bfloat16',
        optimizer=dict(type='AdamW', lr=5e-5, betas=(0.0, 0.999), weight_decay=1e-4),
        clip_grad=dict(max_norm=1.0)),
    fake=dict(
        type='AmpOptimWrapper',
        dtype='bfloat16',
        optimizer=dict(type='AdamW', lr=1e-4, betas=(0.0, 0.999), weight_decay=1e-4),
        clip_grad=dict(max_norm=1.0)))
param_scheduler = dict(
    student=[
        dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
        dict(type='CosineAnnealingLR', eta_min=5e-7, by_epoch=False, begin=100, end=4000)],
    fake=[
        dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
        dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=False, begin=100, end=4000)])
train_cfg = dict(type='IterBasedTrainLoop', max_iters=4000)
