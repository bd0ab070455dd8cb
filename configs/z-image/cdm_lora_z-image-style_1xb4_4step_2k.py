# Your LoRA of Z-Image in four steps: the teacher is the base with your file, the student a LoRA of the base that
# starts from it. The exported file takes the place of yours. No published recipe.
#
# About 31 GiB (estimated by `cdm doctor`, not run).
_base_ = './cdm_lora_z-image_1xb4_4step_2k.py'

model = dict(teacher=dict(lora='data/style.safetensors'))
