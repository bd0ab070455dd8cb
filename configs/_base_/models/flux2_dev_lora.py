# FLUX.2-dev at 1024x1024 pixels, student and fake score as LoRA adapters of one frozen base, which is also the teacher.
# `config` is what the pretrained network must have: checked when it is loaded, and `cdm doctor` counts by it.
#
# The network is guidance-distilled: its velocity has the guidance that it is told (4) with any prompt, the empty one
# too. So the difference of the two, which alpha scales, is no guidance, and its pipeline has none either: alpha = 0,
# the student learns the teacher's own. CA has nothing to add then, and is left out with its two calls of the teacher.
# The shift depends on the number of levels; the four are 1, 0.97, 0.91 and 0.77.
model = dict(
    backbone=dict(
        type='Flux2Backbone',
        pretrained='black-forest-labs/FLUX.2-dev',
        config=dict(
            in_channels=128, num_layers=8, num_single_layers=48, attention_head_dim=128, num_attention_heads=48,
            joint_attention_dim=15360, guidance_embeds=True, axes_dims_rope=[32, 32, 32, 32]),
        dtype='bfloat16',
        conditioner=dict(dtype='bfloat16', offload=True)),
    lora=dict(rank=64, alpha=128),
    sample_sigmas=[1.0, 0.75, 0.5, 0.25],
    alpha=0.0,
    losses=dict(ca=None),
    image_size=1024,
    activation_checkpointing=True)
