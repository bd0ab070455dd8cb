"""`cdm doctor`: what a config resolves to, what it needs and what would fail, before anything is loaded."""
from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cdm_plugin.cli import CommandParser


def add_arguments(parser: CommandParser) -> None:
    parser.add_argument('config', help='a config file or a shipped recipe')
    parser.add_argument('--gpus', type=parser.positive, default=1, help='GPUs that it will run on (default 1)')
    parser.add_config_options()


def run(args: argparse.Namespace) -> int:
    from cdm_plugin.commands.doctor.diagnosis import diagnose
    from cdm_plugin.commands.doctor.report import format_report
    from cdm_plugin.config import read_config
    report = diagnose(read_config(args.config, args.cfg_options), gpus=args.gpus)
    print(format_report(report))
    return 1 if report.problems else 0
