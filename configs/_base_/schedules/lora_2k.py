_base_ = './lora_4k.py'

train_cfg = dict(max_iters=2000)
