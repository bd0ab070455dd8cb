# CDM on Krea 2 by LoRA on one GPU: 1 prompt an iteration, 4 an update. No published recipe, and not run.
#
# About 37 GiB (estimated by `cdm doctor`, not run), so a GPU of 48 GB. Cached text embeddings change little.
_base_ = [
    '../_base_/large_runtime.py', '../_base_/models/krea2_lora.py', '../_base_/datasets/prompts.py',
    '../_base_/schedules/lora_4k.py'
]

model = dict(type='CDM')
train_dataloader = dict(batch_size=1)
