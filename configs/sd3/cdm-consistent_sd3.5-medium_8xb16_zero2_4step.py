# CDM on SD3.5-Medium with consistent guidance: the four settings that keep it from drifting on the digits
# (docs/recipes.md), the rest as in the recipe beside it. 8 GPUs x 16 prompts, 2,000 student steps.
#
# About 61 GiB a GPU (estimated by `cdm doctor`, not run), so one of 80 GB.
_base_ = ['./cdm_sd3.5-medium_8xb16_zero2_4step.py']

model = dict(
    anchor_aware_fake=True,
    losses=dict(
        ca=dict(sigma=dict(type='UniformSigma')),
        cdm=dict(guided=True, point_sigma=dict(type='AnchorSigma'))))
