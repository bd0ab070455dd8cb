"""Thousands of wrong inputs, and how each of them ends: `python tests/fuzz.py [--cases 2000]` prints the table.

A case is right if it trains one iteration (or reads the data), or if it ends in one line that names key or file.
Cases are drawn by Hypothesis, the same ones in every run.
"""
import argparse
import contextlib
import copy
import io
import json
import math
import os
import re
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from mmengine.config import Config
from PIL import Image

from cdm_plugin.cli import main
from cdm_plugin.config import RECIPES, RUNNER_KEYS, load_config, read_config
from cdm_plugin.data import (
    EmbeddingDataset,
    ImageLabelDataset,
    PackInputs,
    PromptDataset,
    write_embeddings,
)
from cdm_plugin.data.embeddings.files import INDEX_KEYS, INDEX_VERSION, describe_shard, hash_prompts, write_index
from cdm_plugin.errors import USER_ERRORS

DIGITS = sorted(str(path.relative_to(RECIPES)) for path in RECIPES.glob('digits/*.py'))
LARGE = sorted(str(path.relative_to(RECIPES)) for path in RECIPES.glob('[!_]*/*.py') if path.parent.name != 'digits')
SECONDS = 60  # a case that takes longer hangs
RIGHT = ('went through', 'names its key or file')
VALUES = [None, True, False, 'banana', '', 'asset:none', -1, 0, 1, -5, 0.5, 1e30, 10**20, -10**20, math.inf, math.nan,
          [], {}, [1, 'x'], ['banana'], {'type': 'banana'}, {'type': 3}, {'a': {'b': [None]}}]


class Hang(BaseException):
    """A case that takes too long."""


def ended(case, *names):
    """How a case ends: a word, and the line that it prints.

    Args:
        case (Callable): The case; raises what is wrong, or returns the exit status of a command.
        names (str): What the line must have one of.
    """
    def too_long(*args):
        raise Hang

    errors = io.StringIO()
    signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            status = case()
        line = (errors.getvalue().strip().splitlines() or [''])[-1]
    except USER_ERRORS as error:
        status, line = 2, str(error)
    except SystemExit as error:
        status, line = error.code, (errors.getvalue().strip().splitlines() or [''])[-1]
    except Hang:
        return 'hangs', ''
    except BaseException as error:
        return 'traceback', f'{type(error).__name__}: {error}'
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    if not status:
        return RIGHT[0], line
    said = re.sub(r'^cdm \w+: |\(cdm --traceback.*', '', line)
    named = '\n' not in said.strip() and any(name and name in said for name in names)
    return (RIGHT[1] if named else 'names nothing'), line


# Configs


def places(value, path=()):
    """The path of every value of a config."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield (*path, key)
        yield from places(part, (*path, key))


def small(recipe):
    """A recipe as plain data, of few samples, and without what takes time and is no part of the recipe."""
    cfg = read_config(recipe).to_dict()
    for key in ('val_cfg', 'val_dataloader', 'val_evaluator'):
        cfg.pop(key, None)
    cfg['train_cfg'] = dict(by_epoch=False, max_iters=1)
    cfg['train_dataloader']['batch_size'] = 2
    cfg['custom_hooks'] = [hook for hook in cfg['custom_hooks'] if hook['type'] == 'CDMHook']
    cfg.update(visualizer=None, log_level='ERROR')
    return json.loads(json.dumps(cfg))


def mutated(draw, cfg):
    """Changes one place of a config.

    Returns:
        tuple: The path, the names of which a message should have one, and whether it is surely a mistake.
    """
    path = draw(st.sampled_from([path for path in places(cfg) if path[0] in RUNNER_KEYS]))
    holder = cfg
    for key in path[:-1]:
        holder = holder[key]
    key, old = path[-1], holder[path[-1]]
    kinds = ['value', 'value', 'value', 'word', 'drop', 'nest'] + ['typo', 'typo'] * isinstance(key, str)
    kind = draw(st.sampled_from(kinds))
    names, surely = [part for part in path if isinstance(part, str)], False
    names = [f'{names[0]}:', *names[1:]] if len(names) > 2 else names
    if kind == 'value':
        holder[key] = copy.deepcopy(draw(st.sampled_from(VALUES)))
        surely = isinstance(holder[key], float) and math.isnan(holder[key])
    elif kind == 'word':
        holder[key], surely = 'banana', isinstance(old, (bool, int, float))
        names.append('banana')
    elif kind == 'drop':
        del holder[key]
        names += [] if not isinstance(old, dict) else list(old)
    elif kind == 'nest':
        holder[key] = draw(st.sampled_from([[old], {'banana': old}, [[old, old]]]))
    else:
        at = draw(st.integers(0, len(key) - 1))
        new = draw(st.sampled_from([key[:at] + key[at + 1:], key[:at] + key[at] + key[at:], key + 's']))
        if new and new not in holder:
            holder[new] = holder.pop(key)
            names.append(new)
            # One letter of a short name at the top may well be a variable.
            # Names of one's own: of a hook, of a diffusers network's dimension, of a role.
            surely = (len(path) > 1 or len(key) > 6) and path[-2:-1] not in (('config',), ('param_scheduler',)) \
                and 'losses' not in path
    if isinstance(holder, dict) and 'type' in holder:
        names.append(str(holder['type']))
    return '.'.join(map(str, path)), kind, names, surely


def config_case(draw, folder, number):
    """One changed recipe."""
    recipe = draw(st.sampled_from(DIGITS * 4 + LARGE))
    cfg = copy.deepcopy(BASES.setdefault(recipe, small(recipe)))
    cfg['experiment_name'] = f'fuzz-{number}'
    where, kind, names, surely = mutated(draw, cfg)
    file = folder / 'own.json'
    file.write_text(json.dumps(cfg))
    iterations = cfg.get('train_cfg', {}).get('max_iters') if isinstance(cfg.get('train_cfg'), dict) else None
    runs = recipe in DIGITS and (not isinstance(iterations, (int, float)) or iterations < 2)
    work_dir = folder / 'run'
    how, line = ended((lambda: main(['train', str(file), '--work-dir', str(work_dir)])) if runs
                      else (lambda: load_config(str(file)) and None), *names)
    if how == RIGHT[0] and surely and (
            runs or kind != 'typo' and not re.match('strategy|resume|model.backbone.config', where)):
        how = 'goes through though wrong'
    if runs and list(work_dir.rglob('*.part')):
        how = 'leaves half a file'
    return how, f'{recipe} {where} ({kind}): {line}'


# Data


def damaged(draw, content):
    """Bytes that are cut, changed, repeated or replaced."""
    content = bytearray(content)
    kind = draw(st.sampled_from(['cut', 'flip', 'flip', 'insert', 'repeat', 'strange']))
    at = draw(st.integers(0, max(len(content) - 1, 0)))
    if kind == 'cut':
        return bytes(content[:at])
    if kind == 'flip':
        for _ in range(draw(st.integers(1, 8))):
            at = draw(st.integers(0, len(content) - 1))
            content[at] = draw(st.integers(0, 255))
        return bytes(content)
    if kind == 'insert':
        return bytes(content[:at]) + draw(st.sampled_from(STRANGE)) + bytes(content[at:])
    if kind == 'repeat':
        return bytes(content) * draw(st.integers(2, 40))
    return draw(st.sampled_from(STRANGE))


STRANGE = [b'', b'\0', b'\xff\xfe', '﻿'.encode(), '​'.encode(), b'"', b'{', b'[' * 3000, b'\r', b'\n\n',
           b',,,\n', b'\xed\xa0\x80', 'a cat\n'.encode('utf-16'), 'a cat\n'.encode('utf-16-le'), b'version https://git-lfs.github.com/spec/v1\n',
           b'<!DOCTYPE html><html>', b'"\\ud83d"', b'PK\x03\x04', b'\x89PNG\r\n\x1a\n', b'1' * 5000, b'x' * 200_000]
ROWS = [dict(prompt='a cat'), dict(prompt='two dogs, "one" red', tag='ä'), dict(prompt='a crane 😀', tag=None)]
PROMPTS = {
    '.txt': 'a cat\ntwo dogs\n\na crane 😀\n',
    '.jsonl': ''.join(json.dumps(row) + '\n' for row in ROWS),
    '.csv': 'prompt,tag\na cat,1\n"two dogs, ""one"" red",2\n',
    '.json': json.dumps(ROWS), '.tsv': 'prompt\ttag\na cat\t1\n'}


def prompt_case(draw, folder, number):
    """A damaged file of prompts."""
    suffix = draw(st.sampled_from(sorted(PROMPTS)))
    file = folder / f'prompts{suffix}'
    file.write_bytes(damaged(draw, PROMPTS[suffix].encode()))
    column = draw(st.sampled_from(['prompt', 'prompt', 'tag', 'prompt.0', '']))
    return ended(lambda: read_all(PromptDataset(ann_file=str(file), column=column)), file.name)


def read_all(dataset):
    """Every sample; MMEngine's datasets raise when they are read."""
    for i in range(len(dataset)):
        dataset[i]


def picture_case(draw, folder, number):
    """A damaged picture."""
    suffix = draw(st.sampled_from(['.png', '.jpg', '.gif', '.webp', '.bmp', '.tif']))
    buffer = io.BytesIO()
    mode = draw(st.sampled_from(['RGB', 'L', 'P']))
    picture = Image.fromarray(np.arange(768, dtype=np.uint8).reshape(16, 16, 3)).convert(mode)
    if suffix == '.jpg':
        picture = picture.convert('RGB')
    picture.save(buffer, {'.jpg': 'jpeg', '.tif': 'tiff'}.get(suffix, suffix[1:]))
    file = folder / f'picture{suffix}'
    file.write_bytes(damaged(draw, buffer.getvalue()))

    def read():
        sample = PackInputs(image='image')(dict(prompt='a', image=str(file)))
        assert sample['image'].isfinite().all()
    return ended(read, file.name)


def array_case(draw, folder, number):
    """A damaged file of small pictures and labels."""
    file = folder / 'digits.npz'
    arrays = dict(images=np.zeros((3, 8, 8), np.uint8), labels=np.arange(3))
    if draw(st.booleans()):
        name = draw(st.sampled_from(sorted(arrays)))
        arrays[name] = draw(st.sampled_from([
            np.zeros((2, 8, 8)), np.zeros(3, 'U5'), np.array(3), np.zeros((3, 8, 8, 9), np.uint8), np.array([None, 1]),
            np.zeros((0, 8, 8), np.uint8), -np.arange(3), np.arange(3), np.ones((3, 2, 9, 1), np.uint8)]))
        np.savez(file, **arrays)
    else:
        np.savez(file, **arrays)
        file.write_bytes(damaged(draw, file.read_bytes()))
    return ended(lambda: read_all(ImageLabelDataset(data_file=str(file))), file.name)


def embedding_case(draw, folder, number):
    """A damaged folder of embeddings."""
    root = folder / f'embeddings{number}'
    for name, prompts in (('a', ['a cat', 'a dog']), ('null', [''])):
        write_embeddings(root / f'{name}.safetensors', dict(
            encoder_hidden_states=torch.zeros(len(prompts), 2, 4),
            pooled_projections=torch.zeros(len(prompts), 3)), prompts)
    file = root / draw(st.sampled_from(['a.safetensors', 'null.safetensors', 'index.json']))
    texts = ['a cat', 'a dog']
    index = {**dict.fromkeys(INDEX_KEYS, {}), 'version': INDEX_VERSION, 'shard_size': 2, 'dtype': 'float32',
             'prompts': dict(count=2, sha256=hash_prompts(texts)),
             'shards': [describe_shard(root / 'a.safetensors', texts)]}
    write_index(root, index)
    if file.suffix == '.json' and draw(st.booleans()):
        holder, path = index, draw(st.sampled_from(list(places(index))))
        for key in path[:-1]:
            holder = holder[key]
        holder[path[-1]] = copy.deepcopy(draw(st.sampled_from(VALUES)))
        file.write_text(json.dumps(index))
    else:
        file.write_bytes(damaged(draw, json.dumps(index).encode() if file.suffix == '.json' else file.read_bytes()))

    def read():
        dataset = EmbeddingDataset(data_root=str(root))
        read_all(dataset)
        dataset.null_condition()
    return ended(read, root.name)


# Command lines


def command_case(draw, folder, number):
    """A command line of which one or two words are other ones, are missing or are too many."""
    (folder / 'folder').mkdir(exist_ok=True)
    (folder / 'p.json').write_text('[]')
    (folder / 'good.txt').write_text('3\n')
    (folder / 'bad.py').write_text('a = (\n')
    (folder / 'exits.py').write_text('import sys\nsys.exit(0)\n')
    (folder / 'half.pth').write_bytes(b'PK\x03\x04')
    argv = list(draw(st.sampled_from(COMMANDS)))
    for _ in range(draw(st.integers(1, 2))):
        at, word = draw(st.integers(0, len(argv) - 1)), draw(st.sampled_from(WORDS))
        argv[at:at + draw(st.integers(0, 1))] = draw(st.sampled_from([[word], [word], []]))
    # What was given, and argparse's and the commands' own words for what is missing.
    parts = [part for word in argv for part in re.split('[@=]', word)]
    names = [*argv, *parts, *(Path(part).stem for part in parts), *map(repr, argv), '--prompts', '--checkpoint',
             '--out', 'arguments', 'COMMAND']
    if 'train' in argv[:2]:  # a recipe would train for long
        argv += ['--cfg-options', 'train_cfg.max_iters=1']
    here = os.getcwd()
    os.chdir(folder)
    try:
        how, line = ended(lambda: main(argv), *names)
    finally:
        os.chdir(here)
    return how, f'{argv}: {line}'


WORDS = ['folder', 'p.json', 'good.txt', 'bad.py', 'exits.py', 'half.pth', 'nothing', 'nothing.txt', DIGITS[0],
         DIGITS[-1], '', '3', '-1', 'banana', 'a=b', 'model.alpha=x', 'model.alpa=3', '1e9', 'custom_hooks.9.x=1', '=',
         'x=@y', '\ufeff', '\ud83d', '--num', '--steps', '--cfg-options', '--banana', '--column', '--checkpoint',
         '--traceback']
COMMANDS = [
    ['train', 'own.py', '--work-dir', 'run'], ['train', DIGITS[0], '--resume', 'half.pth'], ['doctor', 'bad.py'],
    ['sample', DIGITS[0], '--prompts', '3', '--num', '1', '--steps', '1', '--out', 'out'], ['compare', 'folder'],
    ['sample', DIGITS[0], '--prompts', 'good.txt', '--checkpoint', 'folder', '--out', 'out'], ['plugins'],
    ['evaluate', f'a={DIGITS[0]}@half.pth', '--prompts', 'good.txt', '--metrics', 'DigitMetric', '--out', 'out'],
    ['export', DIGITS[0], '--checkpoint', 'half.pth', '--out', 'out'],
    ['cache', DIGITS[0], '--out', 'out', '--dataset', 'train_dataloader.dataset']]
# Each kind of case, and its share.
KINDS = {'configs': (config_case, 0.35), 'prompt files': (prompt_case, 0.25), 'pictures': (picture_case, 0.1),
         'arrays': (array_case, 0.05), 'embedding folders': (embedding_case, 0.1),
         'command lines': (command_case, 0.15)}
BASES = {}


def fuzz(kind, cases, folder):
    """Runs cases of a kind.

    Returns:
        tuple: How many end in which way, and those that end badly.
    """
    counts, bad = Counter(), []
    case, _ = KINDS[kind]

    @settings(max_examples=cases, derandomize=True, deadline=None, database=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))
    @given(st.data())
    def run(data):
        how, line = case(data.draw, folder, sum(counts.values()))
        counts[how] += 1
        if how not in RIGHT:
            bad.append(f'{kind}: {how}: {line[:400]}')
            print(bad[-1], flush=True)
    # MMEngine formats every config with yapf, which takes longer than one iteration.
    pretty, Config.pretty_text = Config.pretty_text, property(repr)
    try:
        run()
    finally:
        Config.pretty_text = pretty
    return counts, bad


def shown(counts):
    """A table in Markdown."""
    ways = [*RIGHT, *sorted({way for count in counts.values() for way in count} - {*RIGHT})]
    rows = [['', *ways]] + [['---'] * (len(ways) + 1)]
    rows += [[kind, *(str(count[way]) for way in ways)] for kind, count in counts.items()]
    return '\n'.join(f'| {" | ".join(row)} |' for row in rows)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--cases', type=int, default=2000)
    parser.add_argument('--kinds', nargs='+', default=list(KINDS), choices=KINDS)
    args = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as place:
        for name in args.kinds:
            results[name], _ = fuzz(name, int(args.cases * KINDS[name][1]), Path(place))
    print(shown(results))
    print(f'{time.process_time():.0f} s of CPU time')
