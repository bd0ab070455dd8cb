# Emoji and their names, by benchmarks/emoji/make_data.py.
train_dataloader = dict(
    batch_size=128,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    collate_fn=dict(type='default_collate'),
    dataset=dict(
        type='PromptDataset', data_root='data/emoji', ann_file='train.jsonl', column='caption',
        data_prefix=dict(image='images'), pipeline=[dict(type='PackInputs', image='image')]))
