# CDM on Krea 2 (13 B), full weights sharded by ZeRO 3, with all weights and both optimizers in the CPU's memory,
# where AdamW runs: 8 GPUs x 4 prompts, 64 an update, 1,000 updates of the student. No published recipe: the settings
# are LongCat-Image's.
#
# About 67 GiB a GPU (estimated by `cdm doctor`, not run), so one of 80 GB; 57 GiB of the CPU's memory a process.
# torchrun --nproc_per_node=8 --no-python cdm train krea2/cdm_krea2_8xb4_zero3-offload_4step.py --launcher pytorch
_base_ = [
    '../_base_/large_runtime.py', '../_base_/models/krea2.py', '../_base_/datasets/prompts.py',
    '../_base_/schedules/distillation_4k.py', '../_base_/strategies/zero3.py'
]

model = dict(type='CDM')
strategy = dict(
    zero_optimization=dict(
        offload_optimizer=dict(device='cpu', pin_memory=True), offload_param=dict(device='cpu', pin_memory=True)))
optim_wrapper = dict(student=dict(accumulative_counts=2), fake=dict(accumulative_counts=2))
train_dataloader = dict(batch_size=4)
