# CDM on Z-Image, full weights sharded by ZeRO 3: 8 GPUs x 4 prompts, 64 an update, 1,000 updates of the student. No
# published recipe: the settings are LongCat-Image's, a model of the same size.
#
# About 61 GiB a GPU (estimated by `cdm doctor`, not run), so one of 80 GB.
# torchrun --nproc_per_node=8 --no-python cdm train z-image/cdm_z-image_8xb4_zero3_4step.py --launcher pytorch
_base_ = [
    '../_base_/large_runtime.py', '../_base_/models/z_image.py', '../_base_/datasets/prompts.py',
    '../_base_/schedules/distillation_4k.py', '../_base_/strategies/zero3.py'
]

model = dict(type='CDM')
optim_wrapper = dict(student=dict(accumulative_counts=2), fake=dict(accumulative_counts=2))
train_dataloader = dict(batch_size=4)
