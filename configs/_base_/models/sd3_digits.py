# The digits teacher that the package carries, and the consistent recipe for every method on it.
#
# The published recipe (the defaults of CDM) drifts apart on these images: guidance is missing at some of the
# student's predictions, and one fake score that pools all of them cancels it only on average (docs/recipes.md). Four
# settings mend it: CA's noise level is not capped at the anchor, the CDM loss is guided, it asks at the anchors' own
# noise levels, and the fake score knows the anchor. Settings of a loss that a method does not have are left aside, so
# model.type alone swaps DMD2, DecoupledDMD and CDM. alpha = 1 is the teacher's guidance scale of 2, and student_every
# = 2 gives every method (DMD2 has 5 by default) as many student steps.
model = dict(
    backbone=dict(type='SD3Backbone', pretrained='asset:digits/teacher'),
    sample_sigmas=[1.0, 0.75, 0.5, 0.25],
    alpha=1.0,
    student_every=2,
    anchor_aware_fake=True,
    losses=dict(
        ca=dict(sigma=dict(type='UniformSigma')),
        cdm=dict(guided=True, point_sigma=dict(type='AnchorSigma'))))
