# DMD2 (arXiv 2405.14867, image-free) with an anchor-aware fake score on Krea 2, with the settings of the consistent CDM
# beside it: 8 GPUs x 4 prompts, 1,000 updates of the student. Two fake-score steps a student step, on one rollout,
# where its paper has five: the cheapest sound recipe on the digits (docs/recipes.md); never run on real weights.
#
# About 60 GiB a GPU (estimated by `cdm doctor`, not run), so one of 80 GB; 57 GiB of the CPU's memory a process.
_base_ = './cdm-consistent_krea2_8xb4_zero3-offload_4step.py'

model = dict(type='DMD2')
