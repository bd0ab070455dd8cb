# 800 iterations (fake-score steps), 400 student steps with student_every=2. beta1 = 0, because student and fake score
# chase each other and momentum makes them overshoot; the decay averages over what is left of that. A longer run needs
# the `end` of its schedules changed with max_iters.
optim_wrapper = dict(
    constructor='DistillationOptimWrapperConstructor',
    student=dict(
        type='OptimWrapper',
        optimizer=dict(type='AdamW', lr=2e-4, betas=(0.0, 0.999), weight_decay=1e-4),
        clip_grad=dict(max_norm=1.0)),
    fake=dict(
        type='OptimWrapper',
        optimizer=dict(type='AdamW', lr=4e-4, betas=(0.0, 0.999), weight_decay=1e-4),
        clip_grad=dict(max_norm=1.0)))
param_scheduler = dict(
    student=[
        dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=20),
        dict(type='CosineAnnealingLR', eta_min=1e-6, by_epoch=False, begin=20, end=800)],
    fake=[
        dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=20),
        dict(type='CosineAnnealingLR', eta_min=4e-5, by_epoch=False, begin=20, end=800)])
train_cfg = dict(type='IterBasedTrainLoop', max_iters=800, val_interval=200)
