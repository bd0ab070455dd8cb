# CDM on captioned emoji with consistent guidance (docs/recipes.md).
_base_ = './cdm_sd3-emoji_1xb64_4step_4k.py'

model = dict(
    anchor_aware_fake=True,
    losses=dict(
        ca=dict(sigma=dict(type='UniformSigma')),
        cdm=dict(guided=True, point_sigma=dict(type='AnchorSigma'))))
