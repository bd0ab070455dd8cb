# CDM on LongCat-Image with consistent guidance: the four settings that keep it from drifting on the digits
# (docs/recipes.md), the rest as published. 8 GPUs x 8 prompts, 1,000 student steps.
#
# About 275 GiB a GPU (estimated by `cdm doctor`, not run): weights, gradients and AdamW's state of 6.3 B parameters in
# float32, twice. On smaller GPUs they must be sharded, as in cdm_longcat-image_8xb8_zero3_4step.py.
_base_ = [
    '../_base_/large_runtime.py', '../_base_/models/longcat_image.py', '../_base_/datasets/prompts.py',
    '../_base_/schedules/distillation_2k.py'
]

model = dict(
    type='CDM',
    anchor_aware_fake=True,
    losses=dict(
        ca=dict(sigma=dict(type='UniformSigma')),
        cdm=dict(guided=True, point_sigma=dict(type='AnchorSigma'))))
train_dataloader = dict(batch_size=8)
