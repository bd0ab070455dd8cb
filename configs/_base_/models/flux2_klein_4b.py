# FLUX.2-klein-base-4B at 1024x1024 pixels. Student and fake score train float32 weights; what is frozen is in bfloat16.
# `config` is what the pretrained network must have: checked when it is loaded, and `cdm doctor` counts by it.
#
# The base model, which has classifier-free guidance (a scale of 4 in its pipeline): FLUX.2-klein-4B is distilled
# already. The shift depends on the number of levels; the four are 1, 0.97, 0.91 and 0.77.
model = dict(
    backbone=dict(
        type='Flux2KleinBackbone',
        pretrained='black-forest-labs/FLUX.2-klein-base-4B',
        config=dict(
            in_channels=128, num_layers=5, num_single_layers=20, attention_head_dim=128, num_attention_heads=24,
            joint_attention_dim=7680, guidance_embeds=False, axes_dims_rope=[32, 32, 32, 32]),
        conditioner=dict(dtype='bfloat16')),
    sample_sigmas=[1.0, 0.75, 0.5, 0.25],
    alpha=3.0,
    image_size=1024,
    teacher_dtype='bfloat16',
    activation_checkpointing=True)
