# Trains the emoji teacher from scratch: 64x64 pictures with captions (docs/emoji.md). Export it with
# `cdm export ... --out work_dirs/emoji/teacher`, where the other recipes of this folder look for it.
_base_ = [
    '../_base_/emoji_runtime.py', '../_base_/models/sd3_emoji_new.py', '../_base_/datasets/emoji_images.py'
]

model = dict(
    type='FlowMatching',
    sigma=dict(type='LogitNormalSigma'),
    drop_rate=0.1,
    sample_sigmas=[i / 28 for i in range(28, 0, -1)])
optim_wrapper = dict(
    constructor='DistillationOptimWrapperConstructor',
    student=dict(
        type='AmpOptimWrapper',
        dtype='bfloat16',
        optimizer=dict(type='AdamW', lr=5e-4, weight_decay=1e-2),
        clip_grad=dict(max_norm=1.0)))
param_scheduler = dict(
    student=[
        dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=1000),
        dict(type='CosineAnnealingLR', eta_min=5e-6, by_epoch=False, begin=1000, end=20000)])
train_cfg = dict(type='IterBasedTrainLoop', max_iters=20000)
