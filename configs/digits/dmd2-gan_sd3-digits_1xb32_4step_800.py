# DMD2 with its GAN (arXiv 2405.14867, section 4.3) on the digits and their pictures, weights as published. The head
# learns at the fake score's rate. Without the GAN: --cfg-options model.losses.gan=None
_base_ = './dmd2_sd3-digits_1xb32_4step_800.py'

model = dict(losses=dict(gan=dict(type='GANLoss', width=64)))
train_dataloader = dict(dataset=dict(
    _delete_=True, type='ImageLabelDataset', data_file='asset:digits/digits_16.npz', indices=9000))
optim_wrapper = dict(discriminator=dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=4e-4, betas=(0.0, 0.999), weight_decay=1e-4),
    clip_grad=dict(max_norm=1.0)))
param_scheduler = dict(discriminator=[
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=20),
    dict(type='CosineAnnealingLR', eta_min=4e-5, by_epoch=False, begin=20, end=800)])
