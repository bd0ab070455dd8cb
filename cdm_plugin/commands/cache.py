"""`cdm cache`: text embeddings and latents of a dataset, for training without text encoders and autoencoder."""
from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmengine.config import Config

    from cdm_plugin.cli import CommandParser
    from cdm_plugin.data import CacheReport, LatentReport


def add_arguments(parser: CommandParser) -> None:
    parser.add_argument('config', help='a config file or a shipped recipe')
    parser.add_argument('--out', required=True, help='folder of the embeddings')
    parser.add_argument('--dataset', default='train_dataloader.dataset', metavar='KEY',
                        help='where the dataset stands in the config (default train_dataloader.dataset)')
    parser.add_argument('--dtype', choices=['bfloat16', 'float16', 'float32'], default='bfloat16')
    parser.add_argument('--batch-size', type=parser.positive, default=32)
    parser.add_argument('--shard-size', type=parser.positive, default=1024, help='prompts a file (default 1024)')
    latents = parser.add_argument_group('latents of the pictures')
    latents.add_argument('--latents', action='store_true', help='encode the pictures too, into the folder `latents`')
    latents.add_argument('--views', type=parser.positive, default=1,
                         help="readings of each picture, where the dataset's pipeline draws crops or flips (default 1)")
    latents.add_argument('--seed', type=int, default=0, help='of what the pipeline draws (default 0)')
    latents.add_argument('--latents-dtype', choices=['float32', 'bfloat16', 'float16'], default='float32')
    latents.add_argument('--latents-shard-size', type=parser.positive, default=256, help='latents a file (default 256)')
    latents.add_argument('--workers', type=int, default=0, help='processes that read pictures (default: none)')
    parser.add_config_options()


def run(args: argparse.Namespace) -> None:
    from cdm_plugin.config import load_config
    cfg, kind, folder, prompts, encodes = load_config(args.config, args.cfg_options), 'Embedding', args.out, None, True
    if args.latents:
        kind, folder, prompts = 'Latent', *_cache_latents(cfg, args)
        encodes = prompts is not None and _has_encoders(cfg)
    elif args.views > 1:
        raise ValueError(f'--views {args.views} is of pictures: give --latents as well')
    if encodes:
        folder = _cache_embeddings(cfg, args, prompts)
    print(f'to train on them, in a config over this one:\n{_over(cfg, args.config, kind, folder, encodes)}')


def _over(cfg: Config, config: str, kind: str, folder: str, encodes: bool) -> str:
    """A config over `config` that trains on the folder. It says `_delete_` where the base has the key:
    elsewhere MMEngine hands it to the class."""
    from cdm_plugin.config import RECIPES, find_config

    def replaced(base: Any, **value: Any) -> dict[str, Any]:
        return dict(_delete_=True, **value) if base is not None else value
    file = Path(find_config(config))
    backbone: dict[str, Any] = {}
    if encodes:
        backbone['conditioner'] = replaced(
            cfg.model.backbone.get('conditioner'), type='EmbeddingConditioner', folder=folder)
    if kind == 'Latent' and _is_autoencoder(cfg):
        backbone['codec'] = dict(lazy=True)
    dataset = replaced(cfg.get('train_dataloader', {}).get('dataset'), type=f'{kind}Dataset', data_root=folder)
    shipped = file.is_relative_to(RECIPES)
    lines = [f'_base_ = {(f"cdm_plugin::{file.relative_to(RECIPES).as_posix()}" if shipped else config)!r}']
    if backbone:
        lines.append(f'model = {_code(dict(backbone=backbone))}')
    lines.append(f'train_dataloader = {_code(dict(dataset=dataset))}')
    if kind == 'Embedding':
        lines.append('# a dataset of pictures, or of captions that are drawn, stays: leave its line out')
    return '\n'.join(lines)


def _code(value: Any) -> str:
    """A dict as MMEngine's configs write it."""
    if not isinstance(value, dict):
        return repr(value)
    return f"dict({', '.join(f'{key}={_code(item)}' for key, item in value.items())})"


def _cache_latents(cfg: Config, args: argparse.Namespace) -> tuple[str, list[str] | None]:
    from cdm_plugin.data import cache_latents
    report = cache_latents(cfg, args.out, views=args.views, seed=args.seed, dtype=args.latents_dtype,
                           batch_size=args.batch_size, shard_size=args.latents_shard_size, workers=args.workers,
                           dataset=args.dataset)
    sizes = ', '.join(f'{count} of {height}x{width}' for (height, width), count in sorted(report.sizes.items()))
    print(f'{report.rows} latents ({sizes}), {report.bytes / 2**20:.1f} MiB, shards: {report.shards}'
          f'{_reused(report)}, in {report.folder}/latents')
    return report.folder, report.prompts


def _cache_embeddings(cfg: Config, args: argparse.Namespace, prompts: list[str] | None) -> str:
    from cdm_plugin.data import cache_embeddings
    report = cache_embeddings(cfg, args.out, batch_size=args.batch_size, shard_size=args.shard_size, dtype=args.dtype,
                              dataset=args.dataset, prompts=prompts)
    cut = ', '.join(f'{n} of them cut to what {encoder} takes' for encoder, n in report.truncated.items())
    print(f'{report.prompts} prompts{" (" + cut + ")" if cut else ""}, {report.bytes / 2**20:.1f} MiB, '
          f'shards: {report.shards}{_reused(report)}, in {report.folder}')
    return report.folder


def _reused(report: CacheReport | LatentReport) -> str:
    return f', {report.reused_shards} of them from an earlier run' if report.reused_shards else ''


def _has_encoders(cfg: Config) -> bool:
    """Whether the config's conditioner is one whose embeddings are worth a cache."""
    from mmengine.registry import MODELS

    from cdm_plugin.registry import class_of
    return not getattr(class_of(cfg.model.backbone.get('conditioner'), MODELS), 'light', False)


def _is_autoencoder(cfg: Config) -> bool:
    """Whether the config's codec is one that may be `lazy`; that of a pretrained pipeline is."""
    from mmengine.registry import MODELS

    from cdm_plugin.codecs import VAECodec
    from cdm_plugin.registry import is_type
    codec = cfg.model.backbone.get('codec') or {}
    return 'type' not in codec or is_type(codec, VAECodec, MODELS)
