# What `cdm demo` trains, and docs/results.md supports at this length: the levels of inference instead of the dynamic
# grid, and one rollout for the two fake-score steps of a student step. As good as cdm_sd3-digits_1xb32_4step_800.py at
# 1 to 4 sampling steps, and better at 8, for 8,200 network forwards instead of 13,400. Every iteration has a student
# step, so schedules and intervals are half as long.
_base_ = './cdm_sd3-digits_1xb32_4step_800.py'

model = dict(time_grid=dict(type='FixedTimeGrid'), fake_steps=2, student_every=1)
param_scheduler = dict(
    student=[
        dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=10),
        dict(type='CosineAnnealingLR', eta_min=1e-6, by_epoch=False, begin=10, end=400)],
    fake=[
        dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=10),
        dict(type='CosineAnnealingLR', eta_min=4e-5, by_epoch=False, begin=10, end=400)])
train_cfg = dict(max_iters=400, val_interval=100)
default_hooks = dict(checkpoint=dict(interval=100))
custom_hooks = [
    dict(type='CDMHook'),
    dict(type='SampleGridHook', interval=100, prompts=list(range(10)), num_images=10, steps=[1, 2, 8]),
    dict(type='ValidationGridHook')]
