# DMD2 (arXiv 2405.14867, image-free) with an anchor-aware fake score on Krea 2, with the settings of the CDM recipe
# beside it: 8 GPUs x 4 prompts, 64 an update. One student step every 5 iterations makes 400 updates of the student.
#
# About 60 GiB a GPU (estimated by `cdm doctor`, not run), so one of 80 GB; 57 GiB of the CPU's memory a process.
_base_ = ['./cdm_krea2_8xb4_zero3-offload_4step.py']

model = dict(type='DMD2', anchor_aware_fake=True)
