# Decoupled DMD (arXiv 2511.22677) on LongCat-Image with the settings of CDM's published recipe, the baseline beside it:
# 8 GPUs x 8 prompts, 1,000 student steps.
#
# About 275 GiB a GPU (estimated by `cdm doctor`, not run): weights, gradients and AdamW's state of 6.3 B parameters in
# float32, twice. On smaller GPUs they must be sharded, as in cdm_longcat-image_8xb8_zero3_4step.py.
_base_ = [
    '../_base_/large_runtime.py', '../_base_/models/longcat_image.py', '../_base_/datasets/prompts.py',
    '../_base_/schedules/distillation_2k.py'
]

# CDM's authors never shift the levels of the losses; without this line it is D-DMD's own law.
model = dict(type='DecoupledDMD', sigma_shift='none')
train_dataloader = dict(batch_size=8)
