# CDM on Z-Image with consistent guidance: the four settings that keep it from drifting on the digits
# (docs/recipes.md), the rest as in the recipe beside it. 8 GPUs x 4 prompts, 64 an update.
#
# About 62 GiB a GPU (estimated by `cdm doctor`, not run), so one of 80 GB.
_base_ = ['./cdm_z-image_8xb4_zero3_4step.py']

model = dict(
    anchor_aware_fake=True,
    losses=dict(
        ca=dict(sigma=dict(type='UniformSigma')),
        cdm=dict(guided=True, point_sigma=dict(type='AnchorSigma'))))
