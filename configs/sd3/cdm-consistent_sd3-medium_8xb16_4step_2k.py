# CDM on SD3-Medium, the consistent recipe on the fixed grid with one rollout: 8 GPUs x 16 prompts, 2,000 student steps.
# The evidence is of digits, and of emoji in small forms (docs/recipes.md); never run on real weights.
# _base_/consistent.py says what it is, and in one line the way back to the paper's dynamic grid.
#
# About 108 GiB a GPU (estimated by `cdm doctor`, not run), so one of 141 GB; cached text embeddings save 10 of them.
# torchrun --nproc_per_node=8 --no-python cdm train sd3/cdm-consistent_sd3-medium_8xb16_4step_2k.py --launcher pytorch
# One GPU makes as many updates of this size with fake_steps=1, student_every=2, accumulative_counts=8 under both roles
# and 32,000 iterations; the gradients that wait take 15 GiB more.
_base_ = ['./cdm_sd3-medium_8xb16_4step_4k.py', '../_base_/consistent.py']

model = _base_.consistent.model
param_scheduler = _base_.consistent.param_scheduler
train_cfg = dict(max_iters=2000)
default_hooks = _base_.consistent.default_hooks
custom_hooks = _base_.consistent.custom_hooks
