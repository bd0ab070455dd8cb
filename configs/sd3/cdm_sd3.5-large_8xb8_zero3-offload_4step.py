# CDM on SD3.5-Large (8 B), full weights sharded by ZeRO 3, with all weights and both optimizers in the CPU's memory,
# where AdamW runs: 8 GPUs x 8 prompts, 2,000 student steps. No published recipe: the rates are SD3-Medium's. Without
# offload, drawing the sample grid alone would take 77 GiB.
#
# About 37 GiB a GPU (estimated by `cdm doctor`, not run), so one of 48 GB; 36 GiB of the CPU's memory a process.
# torchrun --nproc_per_node=8 --no-python cdm train sd3/cdm_sd3.5-large_8xb8_zero3-offload_4step.py --launcher pytorch
_base_ = [
    '../_base_/large_runtime.py', '../_base_/models/sd35_large.py', '../_base_/datasets/prompts.py',
    '../_base_/schedules/distillation_4k.py', '../_base_/strategies/zero3.py'
]

model = dict(type='CDM')
strategy = dict(
    zero_optimization=dict(
        offload_optimizer=dict(device='cpu', pin_memory=True), offload_param=dict(device='cpu', pin_memory=True)))
train_dataloader = dict(batch_size=8)
