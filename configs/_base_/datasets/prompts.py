# Your prompts, one a line (a .jsonl or .csv file works too, with `column`). Distillation needs no images.
train_dataloader = dict(
    batch_size=16,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    collate_fn=dict(type='default_collate'),
    dataset=dict(type='PromptDataset', ann_file='data/prompts.txt'))
