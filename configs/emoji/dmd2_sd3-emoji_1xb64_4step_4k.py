# DMD2 (arXiv 2405.14867, image-free) on captioned emoji, with the teacher of this folder (docs/emoji.md).
_base_ = [
    '../_base_/emoji_runtime.py', '../_base_/models/sd3_emoji.py', '../_base_/datasets/emoji_captions.py',
    '../_base_/schedules/emoji_4k.py'
]

model = dict(type='DMD2')
