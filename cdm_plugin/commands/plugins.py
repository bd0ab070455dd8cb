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
    from cdm_plugin.cli import own_commands, plugin_commands
    print(plugins.format_table(plugins.loaded()))
    commands = plugin_commands.find(set(own_commands()))
    if commands:
        width = max(map(len, commands))
        print('\ncommands')
    for name, command in commands.items():
        for point in command.points:
            print(f'{name:<{width}}  {point.value} ({point.dist.metadata["Name"]} {point.dist.version})'
                  f'{f": {command.problem}" if command.problem else ""}')
