"""README and docs/: links lead somewhere, code compiles, commands and configs are what the package takes."""
import inspect
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from mmengine.config import Config
from mmengine.registry import MODELS, TASK_UTILS
from recipes import SD3_LORA

from cdm_plugin import cli
from cdm_plugin.backbones import Backbone
from cdm_plugin.conditioners import Conditioner
from cdm_plugin.config import RECIPES, check_config
from cdm_plugin.losses import ScoreLoss
from cdm_plugin.methods import DiffusionModel
from cdm_plugin.roles.teacher import Teacher
from cdm_plugin.time_grids import DynamicTimeGrid, FixedTimeGrid

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob('*.md'), *ROOT.glob('docs/*.md')])
FENCE = re.compile(r'^```(\w*)\n(.*?)^```$', re.MULTILINE | re.DOTALL)
LINK = re.compile(r'(?<!`)\[[^]\n]*\]\(([^)\s]+)\)')


def prose(page):
    """A page without its blocks of code."""
    return FENCE.sub('', page.read_text(encoding='utf-8'))


def blocks(language):
    """The blocks of a language, named by page and line."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding='utf-8')
        for match in FENCE.finditer(text):
            if match.group(1) == language:
                line = text[:match.start()].count('\n') + 1
                found.append(pytest.param(match.group(2), id=f'{page.relative_to(ROOT)}:{line}'))
    return found


def anchors(page):
    """Anchors of a page's headings, as GitHub and MkDocs make them."""
    headings = re.findall(r'^#+ (.+)$', prose(page), re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page):
    for target in LINK.findall(prose(page)):
        if re.match(r'[a-z]+:', target):
            continue
        path, _, anchor = target.partition('#')
        linked = (page.parent / path).resolve() if path else page
        assert linked.is_relative_to(ROOT) and linked.exists(), target
        # A page of the site links to others of it alone.
        assert page.parent.name != 'docs' or linked.parent.name in ('docs', 'emoji'), target
        assert not anchor or anchor in anchors(linked), target


def test_every_page_of_the_site_is_in_its_menu_and_on_its_front_page():
    def listed(entry):
        return [entry] if isinstance(entry, str) else [page for part in (
            entry.values() if isinstance(entry, dict) else entry) for page in listed(part)]

    pages = {page.name for page in ROOT.glob('docs/*.md')}
    assert sorted(listed(yaml.safe_load((ROOT / 'mkdocs.yml').read_text())['nav'])) == sorted(pages)
    for front in (ROOT / 'README.md', ROOT / 'docs/index.md'):
        linked = {Path(target.split('#')[0]).name for target in LINK.findall(prose(front))}
        assert pages - linked <= {'index.md', 'design.md'}, front


@pytest.mark.parametrize('block', blocks('python'))
def test_python_compiles_and_configs_are_right(block, tmp_path):
    compile(block, 'block', 'exec')
    block = block.replace("'AcmeDataset'", "'PromptDataset'")
    if re.search(r'^(import|from|class|def|with) ', block, re.MULTILINE):
        return  # no config; end_to_end/test_readme.py runs what can run here
    bases = [None]
    if '_base_' not in block and 'train_cfg' not in block.split('val_')[0]:  # a part of one: it changes the README's
        whole = next(text for text, in (param.values for param in blocks('python')) if 'work_dirs/cdm_sd3' in text)
        (tmp_path / 'whole.py').write_text(whole)
        bases = ['whole.py', str(RECIPES / SD3_LORA)]  # or a recipe that has more in it
    for base in bases:
        (tmp_path / 'config.py').write_text(block if base is None else f'_base_ = {base!r}\n{block}')
        check_config(Config.fromfile(tmp_path / 'config.py', import_custom_modules=False))


def commands(block):
    """The command lines of a bash block: comments off, continued lines joined, split at && and |."""
    for line in block.replace('\\\n', ' ').splitlines():
        words, command = shlex.split(line, comments=True), []
        for word in [*words, '&&']:
            if word in ('&&', '|', ';'):
                yield command
                command = []
            else:
                command.append(word)


def check_command(words):
    """What stands in a block must be what the package takes: its own commands, scripts, extras, recipes."""
    words = [word for word in words if not re.fullmatch(r'[A-Z_]+=\S*', word)]
    called = next((i for i, word in enumerate(words) if word in ('cdm', '.venv/bin/cdm')), None)
    if called is not None:
        arguments = words[called + 1:]
        if arguments != ['--version']:
            cli.build_parser(arguments).parse_args(arguments)
        assert not called or words[0] in ('torchrun', 'deepspeed', 'srun'), words
    elif words[:1] == ['python'] and words[1].endswith('.py'):
        source = (ROOT / words[1]).read_text()
        for option in (word.split('=')[0] for word in words[2:] if word.startswith('--')):
            assert f"'{option}'" in source, f'{words[1]} has no {option}'
    for word in words:
        for extra in re.findall(r'^(?:\.|cdm_plugin)\[(\w+)\]', word):
            assert f"'{extra}': " in (ROOT / 'setup.py').read_text(), extra
        source = word.split('=', 1)[-1].split('@')[0]
        if source.endswith('.py') and source.split('/')[0] in {path.name for path in RECIPES.iterdir()}:
            assert (RECIPES / source).is_file(), source


@pytest.mark.parametrize('block', blocks('bash'))
def test_commands_are_what_the_package_takes(block):
    found = [command for command in commands(block) if command]
    assert found
    for command in found:
        check_command(command)


def spans():
    """Code within the text: (page, span)."""
    return [(page, span) for page in PAGES for span in re.findall(r'`([^`\n]+)`', prose(page))]


def test_commands_within_the_text_are_what_the_package_takes():
    checked = 0
    for page, span in spans():
        words = span.split()
        if words[0] != 'cdm' or len(words) < 2 or words[1].startswith('-') or not words[1].islower():
            continue
        parser = cli.build_parser(words[1:])
        subparser = next(action for action in parser._actions if action.dest == 'command').choices[words[1]]
        options = {option for action in subparser._actions for option in action.option_strings}
        assert {word for word in words if word.startswith('--')} <= options, (page, span)
        checked += 1
    assert checked > 20


def test_recipes_that_are_named_exist():
    folders = '|'.join(sorted(path.name for path in RECIPES.iterdir() if path.name != '_base_'))
    named = {}
    for page in PAGES:
        for name in re.findall(rf'\b((?:{folders})/[\w{{}},.-]+\.py)', page.read_text(encoding='utf-8')):
            choice = re.search(r'\{(.+)\}', name)
            for option in choice.group(1).split(',') if choice else ['']:
                named[re.sub(r'\{.+\}', option, name)] = page
    assert len(named) > 15
    assert [name for name in named if not any((root / name).is_file() for root in (RECIPES, ROOT / 'benchmarks'))] == []


@pytest.mark.parametrize('page', ['README.md', 'docs/recipes.md'])
def test_every_folder_of_recipes_is_named(page):
    text = (ROOT / page).read_text(encoding='utf-8')
    folders = {path.name for path in RECIPES.iterdir() if path.is_dir() and not path.name.startswith('_')}
    assert len(folders) > 5 and {name for name in folders if f'`{name}/' not in text} == set()


def test_bases_that_are_named_exist():
    for page in PAGES:
        for name in re.findall(r'cdm_plugin::([\w/.-]+\.py)', page.read_text(encoding='utf-8')):
            assert name == 'x.py' or (RECIPES / name).is_file(), (page, name)


def arguments(registry, base):
    """What the registered classes of a kind take in a config."""
    return {name for cls in registry.module_dict.values() if isinstance(cls, type) and issubclass(cls, base)
            for owner in cls.__mro__ if '__init__' in vars(owner) for name in inspect.signature(owner).parameters}


def test_keys_of_the_model_that_are_named_exist():
    known = {'model': arguments(MODELS, DiffusionModel), 'model.backbone': arguments(MODELS, Backbone),
             'model.backbone.conditioner': arguments(MODELS, Conditioner),
             'model.losses.*': arguments(MODELS, ScoreLoss),
             'model.teacher': {field.name for field in fields(Teacher)},
             'model.time_grid': arguments(TASK_UTILS, (DynamicTimeGrid, FixedTimeGrid))}
    checked = 0
    for page in PAGES:
        text = prose(page)
        if page.name == 'migration.md':  # the first column is others' keys
            text = re.sub(r'^\|.+? \| ', '', text, flags=re.MULTILINE)
        for key in re.findall(r'`(model(?:\.[\w<>*]+)+)', text):
            parent, _, name = re.sub(r'^model\.losses\.[\w<>*]+(?=\.)', 'model.losses.*', key).rpartition('.')
            if parent in known and name.isidentifier() and name != 'type':
                assert name in known[parent], (page.name, key)
                checked += 1
    assert checked > 80


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    assert find_spec('mkdocs') and find_spec('mkdocstrings'), "pip install -c constraints.txt '.[docs]'"
    done = subprocess.run([sys.executable, '-m', 'mkdocs', 'build', '--strict', '-q', '-d', str(tmp_path / 'site')],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    reference = (tmp_path / 'site/api/index.html').read_text()
    for name in ('cdm_plugin.methods.CDM', 'cdm_plugin.hooks.SampleGridHook', 'cdm_plugin.backbones.SD3Backbone'):
        assert f'id="{name}"' in reference
