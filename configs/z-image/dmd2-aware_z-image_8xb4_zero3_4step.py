# DMD2 (arXiv 2405.14867, image-free) with an anchor-aware fake score on Z-Image, with the settings of the CDM recipe
# beside it: 8 GPUs x 4 prompts, 64 an update. One student step every 5 iterations makes 400 updates of the student.
#
# About 61 GiB a GPU (estimated by `cdm doctor`, not run), so one of 80 GB.
_base_ = ['./cdm_z-image_8xb4_zero3_4step.py']

model = dict(type='DMD2', anchor_aware_fake=True)
