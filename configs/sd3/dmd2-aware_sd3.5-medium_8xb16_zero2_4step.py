# DMD2 (arXiv 2405.14867, image-free) with an anchor-aware fake score on SD3.5-Medium, with the settings of the
# consistent CDM beside it: 8 GPUs x 16 prompts, 2,000 student steps. Two fake-score steps a student step, on one
# rollout, where its paper has five: the cheapest sound recipe on the digits (docs/recipes.md); never run on real
# weights.
#
# About 57 GiB a GPU (estimated by `cdm doctor`, not run), so one of 80 GB.
_base_ = './cdm-consistent_sd3.5-medium_8xb16_zero2_4step.py'

model = dict(type='DMD2')
