# CDM on Z-Image, the consistent recipe on the fixed grid with one rollout: 8 GPUs x 4 prompts, 1,000 updates of the
# student. The evidence is of digits, and of emoji in small forms (docs/recipes.md); never run on real weights.
# _base_/consistent.py says what it is, and in one line the way back to the paper's dynamic grid.
#
# About 62 GiB a GPU (estimated by `cdm doctor`, not run), so one of 80 GB.
_base_ = ['./cdm_z-image_8xb4_zero3_4step.py', '../_base_/consistent.py']

model = _base_.consistent.model
param_scheduler = _base_.consistent.param_scheduler
train_cfg = dict(max_iters=2000)
default_hooks = _base_.consistent.default_hooks
custom_hooks = _base_.consistent.custom_hooks
# The student's update joins two iterations, 64 prompts. Fake-score steps of one rollout are not joined: four updates of
# 32 prompts each.
optim_wrapper = dict(fake=dict(accumulative_counts=1))
