# 9,000 digits with their labels; the last 1,000 of the file are held out.
train_dataloader = dict(
    batch_size=128,
    num_workers=0,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    collate_fn=dict(type='default_collate'),
    dataset=dict(type='ImageLabelDataset', data_file='asset:digits/digits_16.npz', indices=9000))
