# 200 digits at `sample_sigmas` from the EMA student, the same noise every time. The distance is to the guided teacher's
# 50-step samples, as in `cdm demo`; with 200 samples it lies above the demo's, which has 1,000.
val_dataloader = dict(
    batch_size=200,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    collate_fn=dict(type='default_collate'),
    dataset=dict(type='LabelDataset', num_classes=10, length=200))
val_evaluator = dict(type='DigitMetric', reference='asset:digits/teacher_features.npz')
val_cfg = dict()
