# DMD2 (arXiv 2405.14867, image-free) with an anchor-aware fake score on SD3.5-Medium, with the settings of the CDM
# recipe beside it: 8 GPUs x 16 prompts. One student step every 5 iterations makes 800.
#
# About 57 GiB a GPU (estimated by `cdm doctor`, not run), so one of 80 GB.
_base_ = ['./cdm_sd3.5-medium_8xb16_zero2_4step.py']

model = dict(type='DMD2', anchor_aware_fake=True)
