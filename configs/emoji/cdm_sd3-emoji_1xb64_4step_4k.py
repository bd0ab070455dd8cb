# CDM as published (arXiv 2605.06376) on captioned emoji, with the teacher of this folder (docs/emoji.md).
_base_ = [
    '../_base_/emoji_runtime.py', '../_base_/models/sd3_emoji.py', '../_base_/datasets/emoji_captions.py',
    '../_base_/schedules/emoji_4k.py'
]

model = dict(type='CDM')
