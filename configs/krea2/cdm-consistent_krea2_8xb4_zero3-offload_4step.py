# CDM on Krea 2 with consistent guidance: the four settings that keep it from drifting on the digits
# (docs/recipes.md), the rest as in the recipe beside it. 8 GPUs x 4 prompts, 64 an update.
#
# About 67 GiB a GPU (estimated by `cdm doctor`, not run), so one of 80 GB; 57 GiB of the CPU's memory a process.
_base_ = ['./cdm_krea2_8xb4_zero3-offload_4step.py']

model = dict(
    anchor_aware_fake=True,
    losses=dict(
        ca=dict(sigma=dict(type='UniformSigma')),
        cdm=dict(guided=True, point_sigma=dict(type='AnchorSigma'))))
