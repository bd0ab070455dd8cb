# DeepSpeed's ZeRO 3: the weights of student, fake score, teacher and text encoders are shared out as well, and gathered
# block by block while they are used. Gradients are summed in float32.
_base_ = './zero2.py'

strategy = dict(zero_optimization=dict(stage=3, stage3_prefetch_bucket_size=50_000_000))
