# The emoji teacher, trained by emoji/teacher_flow-matching_sd3-emoji_1xb128_20k.py and exported (`cdm export`).
# alpha = 2 is the guidance scale of 3; every method has as many fake-score steps a student step.
_base_ = './sd3_emoji_new.py'

model = dict(
    backbone=dict(pretrained='work_dirs/emoji/teacher'),
    sample_sigmas=[1.0, 0.75, 0.5, 0.25],
    alpha=2.0,
    student_every=2)
