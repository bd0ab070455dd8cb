# CDM on LongCat-Image in full weights on one GPU: 2 prompts an iteration, 16 an update; all weights and both optimizers
# wait in the CPU's memory, where AdamW runs. No published recipe.
#
# About 30 GiB (estimated by `cdm doctor`, not run), so a GPU of 40 GB; 222 GiB of the CPU's memory.
# cdm train longcat/cdm_longcat-image_1xb2_zero3-offload_4step.py
_base_ = ['./cdm_longcat-image_8xb8_zero3_4step.py']

model = dict(backbone=dict(conditioner=dict(offload=True)))
strategy = dict(
    zero_optimization=dict(
        offload_optimizer=dict(device='cpu', pin_memory=True), offload_param=dict(device='cpu', pin_memory=True)))
optim_wrapper = dict(student=dict(accumulative_counts=8), fake=dict(accumulative_counts=8))
train_dataloader = dict(batch_size=2)
