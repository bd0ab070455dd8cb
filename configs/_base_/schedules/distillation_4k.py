# The published schedule (arXiv 2605.06376): 4,000 iterations (fake-score steps), constant learning rates after a
# warm-up of 100. A warm-up counts iterations for both roles, so it spans 50 student steps with student_every=2.
optim_wrapper = dict(
    constructor='DistillationOptimWrapperConstructor',
    student=dict(
        type='AmpOptimWrapper',
        dtype='bfloat16',
        optimizer=dict(type='AdamW', lr=1e-5, betas=(0.9, 0.999), weight_decay=1e-4, fused=True),
        clip_grad=dict(max_norm=1.0)),
    fake=dict(
        type='AmpOptimWrapper',
        dtype='bfloat16',
        optimizer=dict(type='AdamW', lr=5e-6, betas=(0.9, 0.999), weight_decay=1e-4, fused=True),
        clip_grad=dict(max_norm=1.0)))
param_scheduler = dict(
    student=[dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100)],
    fake=[dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100)])
train_cfg = dict(type='IterBasedTrainLoop', max_iters=4000)
