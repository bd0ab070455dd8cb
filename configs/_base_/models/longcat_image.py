# LongCat-Image at 1024x1024 pixels. Student and fake score train float32 weights; what is frozen is in bfloat16.
# `config` is what the pretrained network must have: checked when it is loaded, and `cdm doctor` counts by it. The
# number of layers is the one that gives the released model's size, about 6 B parameters: should its config.json say
# otherwise, loading stops at once and names both numbers.
model = dict(
    backbone=dict(
        type='LongCatImageBackbone',
        pretrained='meituan-longcat/LongCat-Image',
        config=dict(
            in_channels=64, num_layers=10, num_single_layers=20, attention_head_dim=128, num_attention_heads=24,
            joint_attention_dim=3584, axes_dims_rope=[16, 56, 56]),
        conditioner=dict(dtype='bfloat16')),
    sample_sigmas=[1.0, 0.75, 0.5, 0.25],
    alpha=7.0,
    image_size=1024,
    teacher_dtype='bfloat16',
    activation_checkpointing=True)
