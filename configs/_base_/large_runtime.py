# The runtime of models with billions of weights: a checkpoint has student, fake score, EMA and both optimizers, tens of
# gigabytes (`cdm doctor` says how many), and an image of the sample grid takes seconds.
_base_ = './default_runtime.py'

model_wrapper_cfg = dict(type='DistillationDataParallel')  # for a launch of several processes
default_hooks = dict(checkpoint=dict(interval=400, max_keep_ckpts=2))
custom_hooks = [
    dict(type='CDMHook'),
    dict(type='SampleGridHook', interval=400, num_images=4),
    dict(type='PipelineExportHook')]
