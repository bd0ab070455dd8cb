# CDM on FLUX.2-klein-base-4B with consistent guidance: the four settings that keep it from drifting on the digits
# (docs/recipes.md), the rest as in the recipe beside it. 8 GPUs x 8 prompts, 1,000 student steps.
#
# About 59 GiB a GPU (estimated by `cdm doctor`, not run), so one of 80 GB.
_base_ = ['./cdm_flux2-klein-4b_8xb8_zero3_4step.py']

model = dict(
    anchor_aware_fake=True,
    losses=dict(
        ca=dict(sigma=dict(type='UniformSigma')),
        cdm=dict(guided=True, point_sigma=dict(type='AnchorSigma'))))
