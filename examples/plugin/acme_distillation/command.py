"""`cdm acme`: counts the samples of a config's dataset by prompt.

This line is what `cdm --help` shows, without importing the module.
"""
from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cdm_plugin.cli import CommandParser


def add_arguments(parser: CommandParser) -> None:
    parser.add_argument('config', help='a config file or a shipped recipe')
    parser.add_config_options()


def run(args: argparse.Namespace) -> int | None:
    """The exit status, None for 0. What takes seconds to import is imported here, so that mistakes are told at once."""
    from collections import Counter

    from mmengine.registry import DATASETS

    from cdm_plugin.config import load_config
    dataset = DATASETS.build(load_config(args.config, args.cfg_options).train_dataloader.dataset)
    for prompt, count in sorted(Counter(dataset[i]['prompt'] for i in range(len(dataset))).items()):
        print(f'{prompt}: {count}')
