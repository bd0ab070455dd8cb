# CDM on SD3.5-Medium by LoRA on one GPU: 4 prompts an iteration, 16 an update. No published recipe.
#
# About 17 GiB (estimated by `cdm doctor`, not run), so a GPU of 24 GB.
_base_ = [
    '../_base_/large_runtime.py', '../_base_/models/sd35_medium_lora.py', '../_base_/datasets/prompts.py',
    '../_base_/schedules/lora_4k.py'
]

model = dict(type='CDM')
train_dataloader = dict(batch_size=4)
