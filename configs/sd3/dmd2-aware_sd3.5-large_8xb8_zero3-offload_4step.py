# DMD2 (arXiv 2405.14867, image-free) with an anchor-aware fake score on SD3.5-Large, with the settings of the CDM
# recipe beside it: 8 GPUs x 8 prompts. One student step every 5 iterations makes 800.
#
# About 37 GiB a GPU (estimated by `cdm doctor`, not run), so one of 48 GB; 36 GiB of the CPU's memory a process.
_base_ = ['./cdm_sd3.5-large_8xb8_zero3-offload_4step.py']

model = dict(type='DMD2', anchor_aware_fake=True)
