# DMD2 (arXiv 2405.14867, image-free) on SD3-Medium with the settings of CDM's published recipe, the baseline beside it:
# 8 GPUs x 16 prompts. One student step every 5 iterations as in DMD2's paper makes 800; student_every=2 makes 2,000.
#
# About 100 GiB a GPU (estimated by `cdm doctor`, not run), so one of 141 GB; cached text embeddings save 10 of them.
# torchrun --nproc_per_node=8 --no-python cdm train sd3/dmd2_sd3-medium_8xb16_4step_4k.py --launcher pytorch
# One GPU can make the same updates with accumulative_counts=8 under both roles and eight times the iterations; the
# gradients that wait take 15 GiB more.
_base_ = [
    '../_base_/large_runtime.py', '../_base_/models/sd3_medium.py', '../_base_/datasets/prompts.py',
    '../_base_/schedules/distillation_4k.py'
]

model = dict(type='DMD2')
