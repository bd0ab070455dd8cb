"""`cdm configs`: the recipes that come with the package, with a line each."""
from __future__ import annotations

import argparse
import difflib
import re
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cdm_plugin.cli import CommandParser

# Beside this folder; `cdm_plugin.config` has it too, and takes seconds to import.
RECIPES = Path(__file__).parents[1] / '.mim' / 'configs'
# cdm_lora_sd3-medium_1xb4_4step_4k, cdm_sd3.5-large_8xb8_zero3-offload_4step, teacher_flow-matching_sd3-digits_...
NAME = re.compile(r'(?P<method>[a-z0-9-]+)_((?P<kind>lora|flow-matching)_)?(?P<model>[a-z0-9.-]+)_(?P<gpus>\d+)xb\d+'
                  r'(_(?P<sharding>zero[a-z0-9-]+))?(_.+)?')


@dataclass(frozen=True)
class Recipe:
    """A recipe that comes with the package.

    Attributes:
        name (str): What `cdm train` takes, 'sd3/cdm_lora_sd3-medium_1xb4_4step_4k.py'.
        model (str): Of its file's name, 'sd3-medium'.
        method (str): Likewise, 'cdm'.
        scale (str): 'lora', or GPUs and how the weights are shared out, '8gpus-zero2'.
        line (str): The first sentence of its comment.
    """
    name: str
    model: str
    method: str
    scale: str
    line: str

    def is_like(self, **wanted: str | None) -> bool:
        """Whether it has what is wanted of `model`, `method` and `scale`: the name or whole words of it. A folder is
        a model too."""
        folder = self.name.partition('/')[0]
        return all(value is None or value in words(getattr(self, key)) or key == 'model' and value == folder
                   for key, value in wanted.items())


def words(name: str) -> set[str]:
    """The name and what it consists of, 'sd3.5-medium' of 'sd3.5' and 'medium'."""
    parts = name.split('-')
    return {'-'.join(parts[i:j]) for i in range(len(parts)) for j in range(i + 1, len(parts) + 1)}


def recipes() -> list[Recipe]:
    """All of them, sorted; nothing is imported or executed."""
    return [_read(path) for path in sorted(RECIPES.glob('[!_]*/*.py'))]


def _read(path: Path) -> Recipe:
    name = NAME.fullmatch(path.stem)
    lines = path.read_text(encoding='utf-8').splitlines()
    end = next((i for i, line in enumerate(lines) if not re.match('# .', line)), len(lines))  # of the first paragraph
    comment = ' '.join(line.removeprefix('# ') for line in lines[:end])
    gpus = f'{name["gpus"]}gpu{"s" if name["gpus"] != "1" else ""}'
    scale = 'lora' if name['kind'] == 'lora' else '-'.join(filter(None, (gpus, name['sharding'])))
    return Recipe(path.relative_to(RECIPES).as_posix(), name['model'], name['method'], scale,
                  re.split(r'(?<=\.) (?=[A-Z0-9])', comment)[0])


def one_of(names: Iterable[str]) -> Callable[[str], str]:
    """The type of an argument that is one of some names, in any case; another word is refused with what was probably
    meant."""
    known = {name.lower(): name for name in sorted(names)}

    def choose(text: str) -> str:
        if text.lower() in known:
            return known[text.lower()]
        near = difflib.get_close_matches(text.lower(), known, n=1)
        hint = f'did you mean {known[near[0]]!r}?' if near else f'there are {", ".join(known.values())}'
        raise argparse.ArgumentTypeError(f'{text!r} is unknown; {hint}')

    return choose


def add_arguments(parser: CommandParser) -> None:
    known = recipes()
    folders = {recipe.name.partition('/')[0] for recipe in known}
    for key, what in (('model', 'z-image, large'), ('method', 'cdm, cdm-consistent, dmd2'),
                      ('scale', 'lora, 1gpu, 8gpus, zero3, offload')):
        names = {word for recipe in known for word in words(getattr(recipe, key))}
        parser.add_argument(f'--{key}', type=one_of(names | (folders if key == 'model' else set())),
                            metavar='WORD', help=f'of its name: {what}')


def run(args: argparse.Namespace) -> int:
    found = [recipe for recipe in recipes() if recipe.is_like(model=args.model, method=args.method, scale=args.scale)]
    for recipe in found:
        print(recipe.name)
        print(textwrap.fill(recipe.line, 100, initial_indent='    ', subsequent_indent='    '))
    if not found:
        print('no recipe has all of that; `cdm init` writes a config with it where the parts go together')
        return 1
    print('\n`cdm train NAME` trains one as it is, `cdm init` writes a config of your own that starts from one')
    return 0
