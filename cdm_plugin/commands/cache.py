"""`cdm cache`: the text embeddings of a dataset, for training without text encoders, or the latents of its pictures."""
from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cdm_plugin.cli import CommandParser


def add_arguments(parser: CommandParser) -> None:
    parser.add_argument('config', help='a config file or a shipped recipe')
    parser.add_argument('--out', required=True, help='folder of the embeddings')
    parser.add_argument('--latents', action='store_true', help='the latents of the pictures instead')
    parser.add_argument('--dataset', default='train_dataloader.dataset', metavar='KEY',
                        help='where the dataset stands in the config (default train_dataloader.dataset)')
    parser.add_argument('--dtype', choices=['bfloat16', 'float16', 'float32'],
                        help='in the files (default bfloat16; of latents float32)')
    parser.add_argument('--batch-size', type=parser.positive, default=32)
    parser.add_argument('--shard-size', type=parser.positive, help='prompts a file (default 1024; of latents 256)')
    parser.add_config_options()


def run(args: argparse.Namespace) -> None:
    from cdm_plugin.config import load_config
    cfg = load_config(args.config, args.cfg_options)
    (_cache_latents if args.latents else _cache_embeddings)(cfg, args)


def _cache_latents(cfg: Any, args: argparse.Namespace) -> None:
    from mmengine.device import get_device
    from mmengine.registry import MODELS

    from cdm_plugin.conditioners import Conditioner
    from cdm_plugin.data import cache_latents
    from cdm_plugin.data.pairs import dataset_of
    dataset = dataset_of(cfg, args.dataset)
    backbone = MODELS.build(dict(cfg.model.backbone, conditioner=Conditioner()))  # no text encoders
    reused = cache_latents(backbone.codec.to(get_device()), dataset, args.out, batch_size=args.batch_size,
                           shard_size=args.shard_size or 256, dtype=args.dtype or 'float32')
    print(f'{len(dataset)} pictures in {args.out}, shards of an earlier run: {reused}')
    print(f"to train on them: train_dataloader.dataset=dict(type='LatentDataset', data_root={args.out!r}, dataset="
          '<the dataset>)')


def _cache_embeddings(cfg: Any, args: argparse.Namespace) -> None:
    from cdm_plugin.data import cache_embeddings
    report = cache_embeddings(cfg, args.out, batch_size=args.batch_size, shard_size=args.shard_size or 1024,
                              dtype=args.dtype or 'bfloat16', dataset=args.dataset)
    cut = ', '.join(f'{n} of them cut to what {encoder} takes' for encoder, n in report.truncated.items())
    reused = f', {report.reused_shards} of them from an earlier run' if report.reused_shards else ''
    print(f'{report.prompts} prompts{" (" + cut + ")" if cut else ""}, {report.bytes / 2**20:.1f} MiB, '
          f'shards: {report.shards}{reused}, in {report.folder}')
    print('to train on them: train_dataloader.dataset=dict(type=\'EmbeddingDataset\', '
          f'data_root={report.folder!r}) and model.backbone.conditioner=dict(type=\'EmbeddingConditioner\', '
          f'folder={report.folder!r})')
