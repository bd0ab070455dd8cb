# Decoupled DMD (arXiv 2511.22677) on SD3-Medium with the settings of CDM's published recipe, the baseline beside it:
# 8 GPUs x 16 prompts, 2,000 student steps.
#
# About 100 GiB a GPU (estimated by `cdm doctor`, not run), so one of 141 GB; cached text embeddings save 10 of them.
# torchrun --nproc_per_node=8 --no-python cdm train sd3/decoupled-dmd_sd3-medium_8xb16_4step_4k.py --launcher pytorch
# One GPU can make the same updates with accumulative_counts=8 under both roles and eight times the iterations; the
# gradients that wait take 15 GiB more.
_base_ = [
    '../_base_/large_runtime.py', '../_base_/models/sd3_medium.py', '../_base_/datasets/prompts.py',
    '../_base_/schedules/distillation_4k.py'
]

# CDM's authors never shift the levels of the losses; without this line it is D-DMD's own law.
model = dict(type='DecoupledDMD', sigma_shift='none')
