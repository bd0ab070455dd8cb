"""`cdm pairs`: noise and the teacher's samples of it, for DMD's regression."""
from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cdm_plugin.cli import CommandParser


def add_arguments(parser: CommandParser) -> None:
    parser.add_argument('config', help='a config file or a shipped recipe')
    parser.add_argument('--out', required=True, help='folder of the pairs')
    parser.add_argument('--num', type=parser.positive, help='pairs (default: as many as the dataset has samples)')
    parser.add_argument('--steps', type=parser.positive, default=50, help='of the teacher (default 50)')
    parser.add_argument('--guidance-scale', type=float, help='default 1 + model.alpha')
    parser.add_argument('--seed', type=int, default=0, help='of the noise')
    parser.add_argument('--height', type=parser.positive, help='pixels; default: model.image_size')
    parser.add_argument('--width', type=parser.positive, help='pixels; default: as --height')
    parser.add_argument('--dataset', default='train_dataloader.dataset', metavar='KEY',
                        help='where the dataset stands in the config (default train_dataloader.dataset)')
    parser.add_argument('--batch-size', type=parser.positive, default=16)
    parser.add_argument('--shard-size', type=parser.positive, default=256, help='pairs a file (default 256)')
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none',
                        help='share the work among processes')
    parser.add_config_options()


def run(args: argparse.Namespace) -> None:
    from mmengine.dist import is_main_process

    from cdm_plugin.config import load_config
    from cdm_plugin.data.pairs import dataset_of, make_pairs
    from cdm_plugin.engine.launch import join_processes, stop_processes
    from cdm_plugin.inference import load_method
    cfg = load_config(args.config, args.cfg_options)
    dataset = dataset_of(cfg, args.dataset)
    join_processes(args.launcher)
    size = (args.height or args.width, args.width or args.height) if args.height or args.width else None
    method = load_method(args.config, image_size=size, options=args.cfg_options, roles=['teacher'])
    if not hasattr(method, 'teacher'):
        raise ValueError(f'{args.config} has no teacher: give the config of a distillation')
    method.set_attention(training=False)
    scale = 1 + method.alpha if args.guidance_scale is None else args.guidance_scale
    model = {key: cfg.model.get(key) for key in ('backbone', 'teacher')}
    index = dict(count=args.num or len(dataset), shard_size=args.shard_size, seed=args.seed, steps=args.steps,
                 guidance_scale=scale, latents=list(method.latent_shape(1)[1:]), model=model)
    reused = make_pairs(method, dataset, args.out, index, args.batch_size)
    if is_main_process():
        print(f'{index["count"]} pairs in {args.out}, shards of an earlier run: {reused}')
        print(f"to train on them: train_dataloader.dataset=dict(type='PairDataset', data_root={args.out!r}, dataset="
              "<the dataset>) and model.losses.regression=dict(type='RegressionLoss')")
    stop_processes()
