# DMD2 in full on SD3-Medium: the GAN on real pictures (arXiv 2405.14867, section 4.3) beside the DM loss, with its
# published weights (5e-3 for the student, 1e-2 for the fake score's trunk). The rest is dmd2_sd3-medium_8xb16_4step_4k.
#
# data/captions.jsonl: a caption and a picture's file name a line; the pictures, of any size, lie in data/images.
# About 112 GiB a GPU (estimated by `cdm doctor`, not run). Without the GAN: --cfg-options model.losses.gan=None
# torchrun --nproc_per_node=8 --no-python cdm train sd3/dmd2-gan_sd3-medium_8xb16_4step_4k.py --launcher pytorch
_base_ = './dmd2_sd3-medium_8xb16_4step_4k.py'

model = dict(losses=dict(gan=dict(type='GANLoss')))
train_dataloader = dict(dataset=dict(
    ann_file='captions.jsonl', data_root='data', column='caption', data_prefix=dict(image='images'),
    pipeline=[dict(type='PackInputs', image='image'), dict(type='ResizeCrop', sizes=1024)]))
optim_wrapper = dict(discriminator=dict(
    type='AmpOptimWrapper',
    dtype='bfloat16',
    optimizer=dict(type='AdamW', lr=5e-6, betas=(0.9, 0.999), weight_decay=1e-4, fused=True),
    clip_grad=dict(max_norm=1.0)))
param_scheduler = dict(discriminator=[dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100)])
