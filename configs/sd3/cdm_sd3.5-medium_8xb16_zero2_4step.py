# CDM on SD3.5-Medium, full weights sharded by ZeRO 2: 8 GPUs x 16 prompts, 2,000 student steps. No published recipe:
# the settings are SD3-Medium's.
#
# About 58 GiB a GPU (estimated by `cdm doctor`, not run), so one of 80 GB.
# torchrun --nproc_per_node=8 --no-python cdm train sd3/cdm_sd3.5-medium_8xb16_zero2_4step.py --launcher pytorch
_base_ = [
    '../_base_/large_runtime.py', '../_base_/models/sd35_medium.py', '../_base_/datasets/prompts.py',
    '../_base_/schedules/distillation_4k.py', '../_base_/strategies/zero2.py'
]

model = dict(type='CDM')
