# CDM on SD3-Medium, the published recipe sharded by ZeRO 2: 8 GPUs x 16 prompts, 2,000 student steps.
#
# About 53 GiB a GPU (estimated by `cdm doctor`, not run), so one of 80 GB.
# torchrun --nproc_per_node=8 --no-python cdm train sd3/cdm_sd3-medium_8xb16_zero2_4step.py --launcher pytorch
_base_ = ['./cdm_sd3-medium_8xb16_4step_4k.py', '../_base_/strategies/zero2.py']
