# A small SD3 architecture (0.58 M parameters) for 16x16 digits, with new weights. 4x8x8 latents by pixel-unshuffle,
# class labels as one-hot tokens.
model = dict(
    backbone=dict(
        type='SD3Backbone',
        config=dict(
            sample_size=8, patch_size=2, in_channels=4, out_channels=4, pos_embed_max_size=8, num_layers=4,
            num_attention_heads=4, attention_head_dim=16, caption_projection_dim=64, joint_attention_dim=22,
            pooled_projection_dim=11, qk_norm='rms_norm'),
        scheduler=dict(shift=3.0),
        conditioner=dict(type='ClassConditioner', num_classes=10, num_tokens=2),
        codec=dict(type='PixelCodec', scale=2)))
