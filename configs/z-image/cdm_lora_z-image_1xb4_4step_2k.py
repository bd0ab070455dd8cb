# CDM on Z-Image by LoRA on one GPU: 4 prompts an iteration, 16 an update. No published recipe.
#
# About 31 GiB (estimated by `cdm doctor`, not run), so a GPU of 40 GB. Cached text embeddings change little.
_base_ = [
    '../_base_/large_runtime.py', '../_base_/models/z_image_lora.py', '../_base_/datasets/prompts.py',
    '../_base_/schedules/lora_2k.py'
]

model = dict(type='CDM')
train_dataloader = dict(batch_size=4)
