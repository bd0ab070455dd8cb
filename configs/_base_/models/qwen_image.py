# Qwen-Image at 1024x1024 pixels. Student and fake score train float32 weights; what is frozen is in bfloat16.
# `config` is what the pretrained network must have: checked when it is loaded, and `cdm doctor` counts by it.
#
# The pipeline's guidance is a scale of 4 (alpha = 3) after which every token is as long as without: guidance='backbone'
# distils that. The published scheduler stretches every list of levels so that it ends at 0.02: of 4 steps, the last one
# would have nothing left to do. Without (`shift_terminal`), the four levels are 1, 0.86, 0.67 and 0.41; the exported
# pipeline has this scheduler too.
model = dict(
    backbone=dict(
        type='QwenImageBackbone',
        pretrained='Qwen/Qwen-Image',
        config=dict(
            patch_size=2, in_channels=64, out_channels=16, num_layers=60, attention_head_dim=128,
            num_attention_heads=24, joint_attention_dim=3584, axes_dims_rope=[16, 56, 56]),
        scheduler=dict(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, base_image_seq_len=256, max_image_seq_len=8192),
        conditioner=dict(dtype='bfloat16')),
    sample_sigmas=[1.0, 0.75, 0.5, 0.25],
    alpha=3.0,
    guidance='backbone',
    image_size=1024,
    teacher_dtype='bfloat16',
    activation_checkpointing=True)
