# Names of emoji, by benchmarks/emoji/make_data.py: distillation needs no images.
train_dataloader = dict(
    batch_size=64,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    collate_fn=dict(type='default_collate'),
    dataset=dict(type='PromptDataset', data_root='data/emoji', ann_file='train.jsonl', column='caption'))
