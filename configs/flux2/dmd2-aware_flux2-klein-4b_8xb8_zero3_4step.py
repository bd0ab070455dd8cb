# DMD2 (arXiv 2405.14867, image-free) with an anchor-aware fake score on FLUX.2-klein-base-4B, with the settings of the
# consistent CDM beside it: 8 GPUs x 8 prompts, 1,000 student steps. Two fake-score steps a student step, on one
# rollout, where its paper has five: the cheapest sound recipe on the digits (docs/recipes.md); never run on real
# weights.
#
# About 45 GiB a GPU (estimated by `cdm doctor`, not run), so one of 80 GB.
_base_ = './cdm-consistent_flux2-klein-4b_8xb8_zero3_4step.py'

model = dict(type='DMD2')
