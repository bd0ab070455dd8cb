"""`cdm init`: a config of your own that starts from a recipe, for your model, data and method."""
from __future__ import annotations

import argparse
import difflib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .configs import Recipe, one_of, recipes  # relative, since this package has two names

if TYPE_CHECKING:
    from cdm_plugin.cli import CommandParser

METHODS = {
    'cdm-consistent': 'CDM with the settings that are best on the digits (docs/recipes.md)',
    'cdm': 'CDM, as the recipe of the model has it',
    'decoupled-dmd': 'Decoupled DMD, which CDM extends',
    'dmd2': 'DMD2 on prompts alone',
    'dmd2-aware': 'the same with a fake score that knows the anchor, two fake-score steps a student step',
    'dmd2-gan': 'DMD2 in full, with its GAN on your pictures',
    'flow-matching': 'fine-tunes the model on your pictures: the teacher of a later student'}
TYPES = {'cdm-consistent': 'CDM', 'cdm': 'CDM', 'decoupled-dmd': 'DecoupledDMD', 'flow-matching': 'FlowMatching'}
DATA = {
    'prompts.txt': 'a prompt a line',
    'prompts.jsonl': 'an object a line, or a csv file; --column names the prompts, --images the folder of its pictures',
    'FOLDER': 'pictures, with one jsonl or csv file of their captions, or a txt file beside each',
    'labels': 'of models that take class labels: all of them alike',
    'digits.npz': 'of models that take class labels: arrays `images` and `labels`'}
# These learn from pictures; the others need what the model is told alone.
PICTURES = ('dmd2-gan', 'flow-matching')
LABELLED = 'sd3-digits'
SUFFIXES = ('.txt', '.jsonl', '.csv')
PROMPT_COLUMNS = ('prompt', 'caption', 'text')


@dataclass
class Data:
    """What the config says of the data.

    Attributes:
        dataset (dict): Changes of the recipe's `train_dataloader.dataset`.
        about (str): What it is, for the comment.
    """
    dataset: dict[str, Any]
    about: str


def add_arguments(parser: CommandParser) -> None:
    parser.add_argument('config', nargs='?', default='my_config.py',
                        help='the file to write (default my_config.py); one that is there is left alone')
    parser.add_argument('--list', action='store_true', help='say what --model, --scale, --method and --data may be')
    parser.add_argument('--model', type=one_of(_starts()), metavar='NAME', help='what is distilled or fine-tuned')
    parser.add_argument('--method', type=one_of(METHODS), metavar='NAME', help=', '.join(METHODS))
    parser.add_argument('--data', metavar='PATH',
                        help='a file of prompts, a folder of pictures with captions, or labels')
    parser.add_argument('--column', help='of the prompts in a jsonl or csv file; default: prompt, caption or text')
    parser.add_argument('--images', metavar='FOLDER', help='where the pictures of a jsonl or csv file lie')
    parser.add_argument('--image-column', metavar='COLUMN', help='of their names; default: the one with such names')
    parser.add_argument('--scale', type=one_of({recipe.scale for recipe in recipes()}), metavar='NAME',
                        help='of the recipe to start from; default: lora where there is one')
    parser.add_argument('--pretrained', metavar='FOLDER',
                        help='your own weights of that architecture, a folder or hub id in the layout of diffusers')


def run(args: argparse.Namespace) -> None:
    if args.list:
        print(_choices())
        return
    target = Path(args.config)
    if target.suffix != '.py':
        raise ValueError(f'{args.config!r} must end in .py: a config is a Python file')
    if target.exists():
        raise FileExistsError(f'{args.config} is there already: name another file, or remove it')
    _ask_for_missing(args)
    recipe, data = _recipe(args), _data(args)
    text = _config(args, recipe, data)
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open('x', encoding='utf-8') as file:
        file.write(text)
    try:
        samples = _check(args.config)
    except BaseException:
        target.unlink()
        raise
    print(f'{args.config} starts from {recipe.name}; its dataset has {samples:,} samples. Next:\n'
          f'  cdm doctor {args.config}\n  cdm train {args.config}')


def _starts() -> dict[str, list[Recipe]]:
    """The recipes that a config may start from, by model; the first of each is the default. Those of emoji and of
    styles need files that their pages tell how to make."""
    found: dict[str, list[Recipe]] = {}
    for recipe in sorted(recipes(), key=lambda recipe: recipe.scale != 'lora'):
        if recipe.method == 'cdm' and not recipe.model.endswith(('-emoji', '-style')):
            found.setdefault(recipe.model, []).append(recipe)
    return dict(sorted(found.items()))


def _methods(model: str) -> dict[str, str]:
    # Guidance-distilled networks have no guidance to keep consistent, and no recipe that does.
    consistent = model == LABELLED or any((recipe.model, recipe.method) == (model, 'cdm-consistent')
                                          for recipe in recipes())
    return {name: line for name, line in METHODS.items() if name != 'cdm-consistent' or consistent}


def _choices() -> str:
    starts = _starts()
    models = {name: f'{", ".join(recipe.scale for recipe in found)}: {found[0].line}' for name, found in starts.items()}
    return '\n\n'.join(f'{head}\n{_table(options)}' for head, options in (
        ('--model, with its --scale, the first by default', models), ('--method', METHODS), ('--data', DATA)))


def _table(options: dict[str, str]) -> str:
    width = max(map(len, options))
    return '\n'.join(f'  {name:<{width}}  {line}' for name, line in options.items())


# What to start from


def _ask_for_missing(args: argparse.Namespace) -> None:
    """Asks in a terminal for what the flags leave open.

    Raises:
        ValueError: Where nobody can be asked.
    """
    missing = [f'--{name}' for name in ('model', 'method', 'data') if getattr(args, name) is None]
    if missing and not sys.stdin.isatty():
        raise ValueError(f'{" and ".join(missing)} missing: `cdm init --list` says what there is; in a terminal '
                         '`cdm init` asks')
    try:
        if args.model is None:
            args.model = _ask('model', {name: found[0].line for name, found in _starts().items()}, LABELLED)
        if args.method is None:
            methods = _methods(args.model)
            args.method = _ask('method', methods, next(iter(methods)))
        if args.data is None:
            print(_table(DATA))
        while not args.data:
            default = 'labels' if args.model == LABELLED else ''
            args.data = input(f'data{f" [{default}]" if default else ""}: ').strip() or default
    except EOFError:
        raise ValueError('no answer: nothing is written') from None


def _ask(what: str, options: dict[str, str], default: str) -> str:
    print(_table(options))
    while True:
        try:
            return one_of(options)(input(f'{what} [{default}]: ').strip() or default)
        except argparse.ArgumentTypeError as error:
            print(error)


def _recipe(args: argparse.Namespace) -> Recipe:
    """The recipe of the model, method and scale; where there is none, that of CDM, which takes every method."""
    if args.method not in _methods(args.model):
        raise ValueError(f'--method {args.method} does not go with {args.model}, which is distilled with the guidance '
                         'that its network has in itself: take cdm')
    starts = _starts()[args.model]
    scale = args.scale or starts[0].scale
    start = next((recipe for recipe in starts if recipe.scale == scale), None)
    if start is None:
        raise ValueError(f'--scale {scale}: {args.model} has {", ".join(recipe.scale for recipe in starts)}')
    return next((recipe for recipe in recipes() if (recipe.model, recipe.method, recipe.scale) == (
        args.model, args.method, scale)), start)


# Data


def _data(args: argparse.Namespace) -> Data:
    pictures = args.method in PICTURES
    if args.model == LABELLED:
        return _labelled(args.data, pictures)
    path = Path(args.data)
    if not path.exists():
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, beside, n=1)
        hint = f'; did you mean {str(path.with_name(near[0]))!r}?' if near else ''
        raise FileNotFoundError(f'--data {args.data!r} does not exist{hint} {args.model} takes texts: a txt, jsonl or '
                                'csv file of prompts, or a folder of pictures with captions')
    file = _captions(path) if path.is_dir() else path
    if file is None:
        return _beside(path, pictures)
    if file.suffix.lower() not in SUFFIXES:
        raise ValueError(f'--data {args.data!r}: {args.model} takes texts, from a {", ".join(SUFFIXES)} file')
    return _texts(args, file, path if path.is_dir() else file.parent, pictures)


def _labelled(data: str, pictures: bool) -> Data:
    if data == 'labels':
        if pictures:
            return Data(dict(_delete_=True, type='ImageLabelDataset', data_file='asset:digits/digits_16.npz',
                             indices=9000), 'The digits that come with the package; the last 1,000 are held out')
        return Data({}, '')
    if not data.endswith('.npz'):
        raise ValueError(f'--data {data!r}: {LABELLED} takes class labels: say labels, or give an npz file of pictures '
                         'and labels')
    return Data(dict(_delete_=True, type='ImageLabelDataset', data_file=data), 'Your pictures and their labels')


def _captions(folder: Path) -> Path | None:
    """The file of captions in a folder; None if each picture has its own beside it."""
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES[1:])
    if len(found) > 1:
        raise ValueError(f'--data {str(folder)!r} has {", ".join(path.name for path in found)}: give the one with the '
                         'captions, {"image": "0001.png", "caption": "a red fox"} a line')
    return found[0] if found else None


def _beside(folder: Path, pictures: bool) -> Data:
    pack = dict(type='PackInputs', **(dict(image='image') if pictures else {}))
    return Data(dict(_delete_=True, type='ImageCaptionFolder', data_root=str(folder),
                     pipeline=[pack, *([dict(type='ResizeCrop', sizes=Code('image_size'))] if pictures else [])]),
                'Your pictures, brought to `image_size`, with the captions beside them' if pictures
                else 'The captions beside your pictures, which this method does not need')


def _texts(args: argparse.Namespace, file: Path, root: Path, pictures: bool) -> Data:
    from cdm_plugin.data.prompt_files import read_rows
    row = next((row for _, row in read_rows(str(file), 'prompt')), None)
    if row is None:
        raise ValueError(f'--data {args.data!r} holds no prompts')
    if isinstance(row, ValueError):
        raise row
    column = args.column or _column(row, [name for name in PROMPT_COLUMNS if name in row] or list(row), '--column')
    if args.column and args.column not in row and '.' not in args.column:
        raise ValueError(f'--column {args.column!r}: {file} has {", ".join(row)}')
    named = {} if column == 'prompt' else dict(column=column)
    if not pictures:
        images = any(_is_image(value) for value in row.values())
        return Data(dict(ann_file=str(file), **named), 'Your prompts' + (
            '; their pictures are left out, since this method needs none' if images else ''))
    named_images = [name for name, value in row.items() if _is_image(value)]
    if not (named_images or args.image_column):
        raise ValueError(f'--data {args.data!r} names no pictures, from which {args.method} learns: give a folder of '
                         'them with captions, or a jsonl or csv file with a column of their names (--image-column)')
    image = args.image_column or _column(row, named_images, '--image-column')
    if image not in row:
        raise ValueError(f'--image-column {image!r}: {file} has {", ".join(row)}')
    places = [Path(args.images)] if args.images else [root, root / 'images']
    place = next((place for place in places if (place / str(row[image])).is_file()), None)
    if place is None:
        raise FileNotFoundError(f'{file}: its first picture, {row[image]!r}, is not in '
                                f'{" or ".join(map(str, places))}; --images names its folder')
    return Data(dict(ann_file=str(file), data_root='', **named, data_prefix={image: str(place)},
                     pipeline=[dict(type='PackInputs', image=image),
                               dict(type='ResizeCrop', sizes=Code('image_size'))]),
                'Your pictures, brought to `image_size`, with their captions')


def _is_image(value: Any) -> bool:
    from cdm_plugin.data.images import SUFFIXES as pictures
    return isinstance(value, str) and value.lower().endswith(pictures)


def _column(row: dict[str, Any], likely: list[str], flag: str) -> str:
    if len(likely) != 1:
        raise ValueError(f'{flag} is missing: which of {", ".join(map(repr, row))} is it?')
    return likely[0]


# The file


def _config(args: argparse.Namespace, recipe: Recipe, data: Data) -> str:
    name, work_dir, changes = args.config, f'work_dirs/{Path(args.config).stem}', []
    is_whole = recipe.method == args.method  # the recipe has all settings of the method
    if args.method == 'flow-matching':
        changes.append('# Pictures are drawn in 28 steps, where a student takes 4.')
    else:
        changes.append("# `type` alone swaps the method: 'DMD2', 'DecoupledDMD', 'TDM', 'CDM'.")
    model = _model(args, is_whole)
    if resizes := args.method in PICTURES and args.model != LABELLED:
        model['image_size'] = Code('image_size')
    changes.append(f'model = {_dict(model, 0)}')
    if resizes:
        changes.insert(0, '# Side in pixels, or (height, width): of the pictures, and of what is drawn.\n'
                          'image_size = 1024')
    if args.method == 'dmd2-gan' and not is_whole:
        changes += ['# The discriminator learns as the fake score does.',
                    'optim_wrapper = dict(discriminator=_base_.optim_wrapper.fake)',
                    'param_scheduler = dict(discriminator=_base_.param_scheduler.fake)']
    if data.dataset:
        changes += [f'# {data.about}.', f'train_dataloader = dict(dataset={_dict(data.dataset, 0)})']
    if args.model != LABELLED:
        changes.append('# train_cfg = dict(max_iters=2000)  # shorter or longer than the recipe')
    out = 'student' if args.method != 'flow-matching' else f'teacher{" --fuse" if recipe.scale == "lora" else ""}'
    return f'''# {args.method} on {args.model} ({recipe.scale}), written by `cdm init`, yours to change.
# It says what differs from its base; `cdm configs` lists what else there is.
#   cdm doctor {name}    # what it resolves to, what it needs, and what would fail
#   cdm train {name}
#   cdm export {name} --checkpoint {work_dir} --out {out}
_base_ = 'cdm_plugin::{recipe.name}'

''' + '\n'.join(changes) + f"\nwork_dir = '{work_dir}'\n"


def _model(args: argparse.Namespace, is_whole: bool) -> dict[str, Any]:
    """What the config says of the model."""
    model: dict[str, Any] = dict(type=TYPES.get(args.method, 'DMD2'))
    if args.pretrained:
        model['backbone'] = dict(pretrained=args.pretrained)
    if args.method == 'flow-matching':
        model['sample_sigmas'] = Code('[i / 28 for i in range(28, 0, -1)]')
    if args.method in ('cdm-consistent', 'dmd2-aware') and not is_whole:
        # Two rollouts, since the fake score may accumulate: the steps of one rollout would be joined.
        model['anchor_aware_fake'], model['student_every'] = True, 2
    if args.method == 'cdm-consistent' and not is_whole:
        model['losses'] = dict(ca=dict(sigma=dict(type='UniformSigma')),
                               cdm=dict(guided=True, point_sigma=dict(type='AnchorSigma')))
        model['time_grid'] = dict(type='FixedTimeGrid')
    if args.method == 'dmd2-gan' and not is_whole:
        model['losses'] = dict(gan=dict(type='GANLoss'))
    return model


class Code(str):
    """What stands in the file as it is."""
    __repr__ = str.__str__


def _dict(value: Any, indent: int) -> str:
    """A value as configs write it, a key a line where a dict is long."""
    if isinstance(value, list):
        return f'[{", ".join(_dict(child, indent) for child in value)}]'
    if not isinstance(value, dict) or not all(key.isidentifier() for key in value):
        return repr(value)
    parts = [f'{key}={_dict(child, indent + 4)}' for key, child in value.items()]
    short = f'dict({", ".join(parts)})'
    if len(short) < 90 - indent and '\n' not in short:
        return short
    space = '\n' + ' ' * (indent + 4)
    return f'dict({space}{f",{space}".join(parts)})'


def _check(config: str) -> int:
    """The number of samples of what has been written, once it is read as a training reads it."""
    from mmengine.registry import DATASETS

    from cdm_plugin.config import load_config, naming_parts
    cfg = load_config(config)
    with naming_parts(cfg):
        dataset = DATASETS.build(cfg.train_dataloader.dataset)
        dataset[0]
    return len(dataset)
