# CDM on LongCat-Image, the published recipe sharded by ZeRO 3: 8 GPUs x 8 prompts, 1,000 student steps.
#
# About 65 GiB a GPU (estimated by `cdm doctor`, not run), so one of 80 GB.
# torchrun --nproc_per_node=8 --no-python cdm train longcat/cdm_longcat-image_8xb8_zero3_4step.py --launcher pytorch
_base_ = ['./cdm_longcat-image_8xb8_4step_2k.py', '../_base_/strategies/zero3.py']
