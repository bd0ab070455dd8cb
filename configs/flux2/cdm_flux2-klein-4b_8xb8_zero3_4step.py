# CDM on FLUX.2-klein-base-4B, full weights sharded by ZeRO 3: 8 GPUs x 8 prompts, 1,000 student steps. No published
# recipe: the settings are LongCat-Image's.
#
# About 54 GiB a GPU (estimated by `cdm doctor`, not run), so one of 80 GB.
# torchrun --nproc_per_node=8 --no-python cdm train flux2/cdm_flux2-klein-4b_8xb8_zero3_4step.py --launcher pytorch
_base_ = [
    '../_base_/large_runtime.py', '../_base_/models/flux2_klein_4b.py', '../_base_/datasets/prompts.py',
    '../_base_/schedules/distillation_2k.py', '../_base_/strategies/zero3.py'
]

model = dict(type='CDM')
train_dataloader = dict(batch_size=8)
