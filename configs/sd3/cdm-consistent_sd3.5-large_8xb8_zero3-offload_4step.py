# CDM on SD3.5-Large with consistent guidance: the four settings that keep it from drifting on the digits
# (docs/recipes.md), the rest as in the recipe beside it. 8 GPUs x 8 prompts, 2,000 student steps.
#
# About 37 GiB a GPU (estimated by `cdm doctor`, not run), so one of 48 GB; 36 GiB of the CPU's memory a process.
_base_ = ['./cdm_sd3.5-large_8xb8_zero3-offload_4step.py']

model = dict(
    anchor_aware_fake=True,
    losses=dict(
        ca=dict(sigma=dict(type='UniformSigma')),
        cdm=dict(guided=True, point_sigma=dict(type='AnchorSigma'))))
