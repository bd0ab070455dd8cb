# The published schedule of LongCat-Image: half of SD3's iterations.
_base_ = './distillation_4k.py'

train_cfg = dict(max_iters=2000)
