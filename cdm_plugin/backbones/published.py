"""What several published models have in common, for `Backbone.published_scheduler` and `published_vae`."""

# Shift by the number of image tokens: arguments of FlowMatchEulerDiscreteScheduler.
DYNAMIC_SHIFT = dict(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256,
                     max_image_seq_len=4096)
# The autoencoder of 16 channels: arguments of AutoencoderKL.
VAE_16 = dict(
    block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16, use_quant_conv=False,
    use_post_quant_conv=False, down_block_types=('DownEncoderBlock2D',) * 4, up_block_types=('UpDecoderBlock2D',) * 4)
