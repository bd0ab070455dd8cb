# The autoencoder of the bench's latent form: 32x32 pictures to 4x8x8 latents, trained on the training set's pictures.
_base_ = ['../../configs/_base_/default_runtime.py', '../../configs/_base_/datasets/emoji_images.py']

model = dict(
    type='AutoencoderTraining',
    autoencoder=dict(
        block_out_channels=(16, 32, 64), down_block_types=('DownEncoderBlock2D',) * 3,
        up_block_types=('UpDecoderBlock2D',) * 3, layers_per_block=1, norm_num_groups=8, latent_channels=4,
        sample_size=32, use_quant_conv=False, use_post_quant_conv=False),  # no such convolutions, as in SD3's
    edge_weight=1.0,
    kl_weight=1e-3)
train_dataloader = dict(batch_size=16, num_workers=0, persistent_workers=False)
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=2e-3, betas=(0.9, 0.99), weight_decay=1e-4),
    clip_grad=dict(max_norm=1.0))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type='CosineAnnealingLR', eta_min=2e-5, by_epoch=False, begin=100, end=2000)]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=2000)
