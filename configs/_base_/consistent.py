# What the consistent recipes of large models change of the recipe beside them. A recipe takes it over key by key:
# `model = _base_.consistent.model` and so on.
#
# Guidance at every prediction and a fake score that knows the anchor, the levels of inference in place of the dynamic
# grid, and one rollout for the two fake-score steps of a student step: 24.5 forwards of a sample a student step instead
# of 37.5. On the digits that is as good at 2 and 4 sampling steps in short runs, and better at 8; small forms of emoji
# agree in the mean, on one seed and two (docs/recipes.md, docs/emoji.md). Every iteration has a student step, so a run,
# its warm-up and its intervals are half as many iterations. Settings of a loss that a method lacks are left aside: DMD2
# takes the same.
#
# The paper's dynamic grid with two rollouts, in twice as many iterations (where a recipe sets
# optim_wrapper.fake.accumulative_counts to 1, with that at 2 again):
# model = dict(time_grid=dict(type='DynamicTimeGrid'), fake_steps=1, student_every=2)
consistent = dict(
    model=dict(
        anchor_aware_fake=True,
        losses=dict(
            ca=dict(sigma=dict(type='UniformSigma')),
            cdm=dict(guided=True, point_sigma=dict(type='AnchorSigma'))),
        time_grid=dict(type='FixedTimeGrid'),
        fake_steps=2,
        student_every=1),
    param_scheduler=dict(
        student=[dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50)],
        fake=[dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50)]),
    default_hooks=dict(checkpoint=dict(interval=200)),
    custom_hooks=[
        dict(type='CDMHook'),
        dict(type='SampleGridHook', interval=200, num_images=4),
        dict(type='PipelineExportHook')])
