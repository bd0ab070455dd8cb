# Krea 2 with student and fake score as LoRA adapters of one frozen base, which is also the teacher.
_base_ = './krea2.py'

model = dict(
    backbone=dict(dtype='bfloat16', conditioner=dict(offload=True)),
    lora=dict(rank=64, alpha=128),
    teacher_dtype=None)  # the base's
