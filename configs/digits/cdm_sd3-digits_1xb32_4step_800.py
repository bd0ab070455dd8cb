# CDM on the digits with consistent guidance, the recipe of docs/results.md: 32 labels an iteration, on a CPU.
_base_ = [
    '../_base_/default_runtime.py', '../_base_/models/sd3_digits.py', '../_base_/datasets/digits_labels.py',
    '../_base_/datasets/digits_validation.py', '../_base_/schedules/digits_800.py'
]

model = dict(type='CDM')
default_hooks = dict(checkpoint=dict(interval=200))
custom_hooks = [
    dict(type='CDMHook'),
    dict(type='SampleGridHook', interval=200, prompts=list(range(10)), num_images=10, steps=[1, 2, 8]),
    dict(type='ValidationGridHook')]
