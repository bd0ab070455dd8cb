"""docs/paper.md leads to what exists, and from everything in the files of the method."""
import ast
import re
from functools import cache
from pathlib import Path

import pytest
from mmengine.config import Config
from tests_support import tiny_method

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / 'docs' / 'paper.md').read_text()
CODE = re.compile(r'`([\w/]+\.py):([\w.]+)`')
TEST = re.compile(r'`([\w/]+\.py)::(\w+)`')
FILES = re.compile(r'`((?:tests/)?test_\w[\w/]*\.py|tests/[\w/]+\.py)`')
SETTING = re.compile(r'`(?:model\.)?([a-z_.<>]+)=([^`]+)`')
MATHS = ('flow', 'draws', 'time_grids', 'sigma_samplers', 'rollout', 'sampling', 'losses/functional',
         'losses/direction', 'methods/cdm', 'methods/dmd2', 'methods/decoupled_dmd', 'methods/flow_matching',
         'methods/tdm', 'methods/distillation', 'methods/phases')


@cache
def names_in(path):
    """Classes and functions of a file, and `Class.method`: what the file itself defines."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names.update(f'{node.name}.{method.name}' for method in node.body if isinstance(method, ast.FunctionDef))
    return names


def tables():
    """The tables of the page: a header, and rows of cells."""
    for block in re.findall(r'(?:^\|.*\n)+', PAGE, re.MULTILINE):
        # A bar within a cell is written \|.
        cells = [re.split(r'(?<!\\)\|', line)[1:-1] for line in block.splitlines()]
        header, _, *rows = [[cell.strip() for cell in row] for row in cells]
        yield header, rows


def missing(references, folder):
    return [f'{file}: {name}' for file, name in references
            if not (folder / file).is_file() or name not in names_in(folder / file)]


def test_code_and_tests_that_the_page_names_exist():
    code, tests = CODE.findall(PAGE), TEST.findall(PAGE)
    assert len(code) > 60 and len(tests) > 50
    assert missing(code, ROOT / 'cdm_plugin') == []
    assert missing(tests, ROOT / 'tests') == []
    assert all(name.startswith('test_') for _, name in tests)
    for file in FILES.findall(PAGE):
        assert (ROOT / 'tests' / file.removeprefix('tests/')).is_file(), file


def test_every_reference_is_of_one_of_the_two_forms():
    """A typo would otherwise take a reference out of the check."""
    spans = {span for span in re.findall(r'`([^`]+)`', PAGE) if '.py' in span}
    assert spans == {span for span in spans if CODE.fullmatch(f'`{span}`') or TEST.fullmatch(f'`{span}`')
                     or FILES.fullmatch(f'`{span}`')}


def test_every_row_leads_to_code_and_to_a_test():
    for header, rows in tables():
        assert all(len(row) == len(header) for row in rows), header
        assert header[0] == 'here' or all(all(row) for row in rows), header
        if 'test' in header:
            for row in rows:
                assert CODE.search(row[header.index('code')]) and TEST.search(row[header.index('test')]), row


def settings():
    """Dotted keys of `model` and their values; `<name>` stands for each loss of CDM."""
    for key, value in SETTING.findall(PAGE):
        if '...' not in value:
            yield from {(key.replace('<name>', name), value) for name in ('ca', 'dm', 'cdm')}


@pytest.mark.parametrize('key, value', sorted(set(settings())))
def test_every_setting_that_the_page_names_is_one(key, value):
    config = Config(dict(model=dict()))
    config.merge_from_dict({f'model.{key}': eval(value, dict(dict=dict))})
    tiny_method('CDM', **config.model)


@pytest.mark.parametrize('name', MATHS)
def test_everything_in_the_files_of_the_method_is_on_the_page(name):
    path = ROOT / 'cdm_plugin' / f'{name}.py'
    public = {name for name in names_in(path) if not name.startswith('_') and '.' not in name}
    on_page = {symbol.split('.')[0] for file, symbol in CODE.findall(PAGE) if file == f'{name}.py'}
    assert public and public - on_page == set(), 'give it a row in docs/paper.md, or a reason in its last table'
