"""`cdm plugins`: what was loaded from where."""
from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cdm_plugin.cli import CommandParser


def add_arguments(parser: CommandParser) -> None:
    """There are none."""


def run(args: argparse.Namespace) -> None:
    from cdm_plugin import plugins
    print(plugins.format_table(plugins.loaded()))
