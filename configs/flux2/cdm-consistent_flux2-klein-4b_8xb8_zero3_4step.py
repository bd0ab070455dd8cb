# CDM on FLUX.2-klein-base-4B, the consistent recipe on the fixed grid with one rollout: 8 GPUs x 8 prompts, 1,000
# student steps. The evidence is of digits, and of emoji in small forms (docs/recipes.md); never run on real
# weights. _base_/consistent.py says what it is, and in one line the way back to the paper's dynamic grid.
#
# About 59 GiB a GPU (estimated by `cdm doctor`, not run), so one of 80 GB.
_base_ = ['./cdm_flux2-klein-4b_8xb8_zero3_4step.py', '../_base_/consistent.py']

model = _base_.consistent.model
param_scheduler = _base_.consistent.param_scheduler
train_cfg = dict(max_iters=1000)
default_hooks = _base_.consistent.default_hooks
custom_hooks = _base_.consistent.custom_hooks
