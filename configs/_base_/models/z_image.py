# Z-Image at 1024x1024 pixels. Student and fake score train float32 weights; what is frozen is in bfloat16.
# `config` is what the pretrained network must have: checked when it is loaded, and `cdm doctor` counts by it.
#
# The model's card samples with a guidance scale of 4, which counts from 0 there: alpha = 4. The scheduler shifts by 6,
# so the four levels are 1, 0.95, 0.86 and 0.67.
model = dict(
    backbone=dict(
        type='ZImageBackbone',
        pretrained='Tongyi-MAI/Z-Image',
        config=dict(
            in_channels=16, dim=3840, n_layers=30, n_refiner_layers=2, n_heads=30, n_kv_heads=30, cap_feat_dim=2560,
            all_patch_size=[2], axes_dims=[32, 48, 48]),
        conditioner=dict(dtype='bfloat16')),
    sample_sigmas=[1.0, 0.75, 0.5, 0.25],
    alpha=4.0,
    image_size=1024,
    teacher_dtype='bfloat16',
    activation_checkpointing=True)
