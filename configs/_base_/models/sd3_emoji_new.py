# An SD3 architecture with new weights for 64x64 emoji with captions: 6 layers of width 384, 12x32x32 latents by
# pixel-unshuffle (256 tokens), conditioned on the token states of a small text encoder, cached by
# benchmarks/emoji/make_data.py.
model = dict(
    backbone=dict(
        type='SD3Backbone',
        config=dict(
            sample_size=32, patch_size=2, in_channels=12, out_channels=12, pos_embed_max_size=32, num_layers=6,
            num_attention_heads=6, attention_head_dim=64, caption_projection_dim=384, joint_attention_dim=384,
            pooled_projection_dim=384, qk_norm='rms_norm'),
        scheduler=dict(shift=3.0),
        conditioner=dict(type='EmbeddingConditioner', folder='data/emoji/embeddings'),
        codec=dict(type='PixelCodec', scale=2)))
