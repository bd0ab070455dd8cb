# Trains the digits teacher that the package carries (cdm_plugin/assets/digits/teacher) from scratch.
_base_ = [
    '../_base_/default_runtime.py', '../_base_/models/sd3_digits_new.py', '../_base_/datasets/digits_images.py',
    '../_base_/datasets/digits_validation.py'
]

model = dict(
    type='FlowMatching',
    sigma=dict(type='LogitNormalSigma'),
    drop_rate=0.1,
    sample_sigmas=[i / 28 for i in range(28, 0, -1)])
optim_wrapper = dict(
    constructor='DistillationOptimWrapperConstructor',
    student=dict(
        type='OptimWrapper',
        optimizer=dict(type='AdamW', lr=1e-3, weight_decay=1e-4),
        clip_grad=dict(max_norm=1.0)))
param_scheduler = dict(
    student=[
        dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
        dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=False, begin=100, end=6000)])
train_cfg = dict(type='IterBasedTrainLoop', max_iters=6000, val_interval=2000)
default_hooks = dict(logger=dict(interval=100), checkpoint=dict(interval=2000))
custom_hooks = [
    dict(type='CDMHook'),
    dict(type='SampleGridHook', interval=2000, prompts=list(range(10)), num_images=10),
    dict(type='ValidationGridHook')]
