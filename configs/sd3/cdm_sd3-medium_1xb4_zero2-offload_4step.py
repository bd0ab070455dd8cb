# CDM on SD3-Medium in full weights on one GPU: 4 prompts an iteration, 16 an update; float32 weights and optimizers
# wait in the CPU's memory, where AdamW runs. No published recipe.
#
# About 27 GiB (estimated by `cdm doctor`, not run), so a GPU of 40 GB; 61 GiB of the CPU's memory.
# cdm train sd3/cdm_sd3-medium_1xb4_zero2-offload_4step.py
_base_ = ['./cdm_sd3-medium_8xb16_zero2_4step.py']

model = dict(backbone=dict(conditioner=dict(offload=True)))
strategy = dict(zero_optimization=dict(offload_optimizer=dict(device='cpu', pin_memory=True)))
optim_wrapper = dict(student=dict(accumulative_counts=4), fake=dict(accumulative_counts=4))
train_dataloader = dict(batch_size=4)
