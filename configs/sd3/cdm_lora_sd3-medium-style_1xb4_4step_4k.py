# Your LoRA of SD3-Medium in four steps: the teacher is the base with your file, the student a LoRA of the base that
# starts from it. The exported file takes the place of yours. No published recipe.
#
# About 16 GiB (estimated by `cdm doctor`, not run).
_base_ = './cdm_lora_sd3-medium_1xb4_4step_4k.py'

model = dict(teacher=dict(lora='data/style.safetensors'))
