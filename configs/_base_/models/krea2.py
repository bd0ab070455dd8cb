# Krea 2 (Raw, the base model) at 1024x1024 pixels. Student and fake score train float32 weights; what is frozen is in
# bfloat16. `config` is what the pretrained network must have: checked when it is loaded, and `cdm doctor` counts by it.
#
# Its pipeline samples with a guidance scale of 4.5, which counts from 0 there: alpha = 4.5. The four levels are 1,
# 0.88, 0.71 and 0.45.
model = dict(
    backbone=dict(
        type='Krea2Backbone',
        pretrained='krea/Krea-2-Raw',
        config=dict(
            in_channels=64, num_layers=28, attention_head_dim=128, num_attention_heads=48, num_key_value_heads=12,
            intermediate_size=16384, text_hidden_dim=2560, num_text_layers=12, axes_dims_rope=[32, 48, 48]),
        conditioner=dict(dtype='bfloat16')),
    sample_sigmas=[1.0, 0.75, 0.5, 0.25],
    alpha=4.5,
    image_size=1024,
    teacher_dtype='bfloat16',
    activation_checkpointing=True)
