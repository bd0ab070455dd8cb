"""`cdm cache`: the text embeddings of a dataset, for training without text encoders."""
from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cdm_plugin.cli import CommandParser


def add_arguments(parser: CommandParser) -> None:
    parser.add_argument('config', help='a config file or a shipped recipe')
    parser.add_argument('--out', required=True, help='folder of the embeddings')
    parser.add_argument('--dataset', default='train_dataloader.dataset', metavar='KEY',
                        help='where the dataset stands in the config (default train_dataloader.dataset)')
    parser.add_argument('--dtype', choices=['bfloat16', 'float16', 'float32'], default='bfloat16')
    parser.add_argument('--batch-size', type=parser.positive, default=32)
    parser.add_argument('--shard-size', type=parser.positive, default=1024, help='prompts a file (default 1024)')
    parser.add_config_options()


def run(args: argparse.Namespace) -> None:
    from cdm_plugin.config import load_config
    from cdm_plugin.data import cache_embeddings
    report = cache_embeddings(load_config(args.config, args.cfg_options), args.out, batch_size=args.batch_size,
                              shard_size=args.shard_size, dtype=args.dtype, dataset=args.dataset)
    cut = ', '.join(f'{n} of them cut to what {encoder} takes' for encoder, n in report.truncated.items())
    reused = f', {report.reused_shards} of them from an earlier run' if report.reused_shards else ''
    print(f'{report.prompts} prompts{" (" + cut + ")" if cut else ""}, {report.bytes / 2**20:.1f} MiB, '
          f'shards: {report.shards}{reused}, in {report.folder}')
    print('to train on them: train_dataloader.dataset=dict(type=\'EmbeddingDataset\', '
          f'data_root={report.folder!r}) and model.backbone.conditioner=dict(type=\'EmbeddingConditioner\', '
          f'folder={report.folder!r})')
