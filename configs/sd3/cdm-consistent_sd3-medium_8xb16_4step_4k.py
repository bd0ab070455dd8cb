# CDM on SD3-Medium with consistent guidance: the four settings that keep it from drifting on the digits
# (docs/recipes.md), the rest as published. 8 GPUs x 16 prompts, 2,000 student steps.
#
# About 108 GiB a GPU (estimated by `cdm doctor`, not run), so one of 141 GB; cached text embeddings save 10 of them.
# torchrun --nproc_per_node=8 --no-python cdm train sd3/cdm-consistent_sd3-medium_8xb16_4step_4k.py --launcher pytorch
# One GPU can make the same updates with accumulative_counts=8 under both roles and eight times the iterations; the
# gradients that wait take 15 GiB more.
_base_ = [
    '../_base_/large_runtime.py', '../_base_/models/sd3_medium.py', '../_base_/datasets/prompts.py',
    '../_base_/schedules/distillation_4k.py'
]

model = dict(
    type='CDM',
    anchor_aware_fake=True,
    losses=dict(
        ca=dict(sigma=dict(type='UniformSigma')),
        cdm=dict(guided=True, point_sigma=dict(type='AnchorSigma'))))
