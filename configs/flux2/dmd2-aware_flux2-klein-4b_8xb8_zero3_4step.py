# DMD2 (arXiv 2405.14867, image-free) with an anchor-aware fake score on FLUX.2-klein-base-4B, with the settings of the
# CDM recipe beside it: 8 GPUs x 8 prompts. One student step every 5 iterations makes 400.
#
# About 45 GiB a GPU (estimated by `cdm doctor`, not run), so one of 80 GB.
_base_ = ['./cdm_flux2-klein-4b_8xb8_zero3_4step.py']

model = dict(type='DMD2', anchor_aware_fake=True)
