# CDM on SD3.5-Large, the consistent recipe on the fixed grid with one rollout: 8 GPUs x 8 prompts, 2,000 student steps.
# The evidence is of digits, and of emoji in small forms (docs/recipes.md); never run on real weights.
# _base_/consistent.py says what it is, and in one line the way back to the paper's dynamic grid.
#
# About 37 GiB a GPU (estimated by `cdm doctor`, not run), so one of 48 GB; 36 GiB of the CPU's memory a process.
_base_ = ['./cdm_sd3.5-large_8xb8_zero3-offload_4step.py', '../_base_/consistent.py']

model = _base_.consistent.model
param_scheduler = _base_.consistent.param_scheduler
train_cfg = dict(max_iters=2000)
default_hooks = _base_.consistent.default_hooks
custom_hooks = _base_.consistent.custom_hooks
