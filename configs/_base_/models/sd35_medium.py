# SD3.5-Medium at 1024x1024 pixels. Student and fake score train float32 weights; what is frozen is in bfloat16.
# `config` is what the pretrained network must have: checked when it is loaded, and `cdm doctor` counts by it.
#
# Its first 13 blocks attend to the image a second time (attn2). The model's card samples with a guidance scale of 4.5.
model = dict(
    backbone=dict(
        type='SD3Backbone',
        pretrained='stabilityai/stable-diffusion-3.5-medium',
        config=dict(
            sample_size=128, patch_size=2, in_channels=16, out_channels=16, num_layers=24, attention_head_dim=64,
            num_attention_heads=24, joint_attention_dim=4096, caption_projection_dim=1536, pooled_projection_dim=2048,
            pos_embed_max_size=384, qk_norm='rms_norm', dual_attention_layers=list(range(13))),
        conditioner=dict(dtype='bfloat16')),
    sample_sigmas=[1.0, 0.75, 0.5, 0.25],
    alpha=3.5,
    image_size=1024,
    teacher_dtype='bfloat16',
    activation_checkpointing=True)
