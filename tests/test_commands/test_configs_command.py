"""`cdm configs`: each recipe with what its own comment says, and what of a name finds it."""
import re
import subprocess
import sys

import pytest
from recipes import CDM, FLUX_LORA, SD3_LORA, SD35_LARGE, gpus_of, shipped

from cdm_plugin.cli import main
from cdm_plugin.commands.configs import recipes
from cdm_plugin.config import RECIPES

QUICK = '''
import sys, cdm_command
cdm_command.main(['configs'])
cdm_command.main(['init', '--list'])
print(sorted({'torch', 'mmengine', 'numpy', 'cdm_plugin'} & set(sys.modules)))
'''


def names(capsys, *flags):
    main(['configs', *flags])
    return {line for line in capsys.readouterr().out.splitlines() if line.endswith('.py')}


def test_all_of_them_are_listed_without_an_import():
    done = subprocess.run([sys.executable, '-c', QUICK], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.endswith('.py')] == shipped() and lines[-1] == '[]'


@pytest.mark.parametrize('recipe', recipes(), ids=lambda recipe: recipe.name)
def test_a_line_is_the_first_sentence_of_the_recipes_own_comment(recipe):
    comment = re.match(r'(# .*\n)+', (RECIPES / recipe.name).read_text())[0].replace('\n# ', ' ').removeprefix('# ')
    assert comment.strip().startswith(recipe.line) and recipe.line.endswith('.') and len(recipe.line) < 230
    for gpus, prompts in re.findall(r'(\d+) GPUs x (\d+) prompts', recipe.line):
        assert f'_{gpus}xb{prompts}_' in recipe.name


def test_words_of_a_name_find_it(capsys):
    assert names(capsys, '--model', 'flux') == {FLUX_LORA}
    assert SD3_LORA in names(capsys, '--model', 'SD3') & names(capsys, '--scale', 'lora')
    large = names(capsys, '--model', 'sd3.5-large', '--method', 'cdm', '--scale', 'offload')
    assert large == {SD35_LARGE, SD35_LARGE.replace('cdm_', 'cdm-consistent_')}
    assert names(capsys, '--model', 'digits', '--method', 'cdm') == {
        name for name in shipped() if name.startswith('digits/cdm')} and CDM in names(capsys, '--scale', '1gpu')
    assert names(capsys, '--method', 'dmd2') == {name for name in shipped() if '/dmd2' in name}


def test_the_scale_is_the_names():
    """Names are what the configs are: tests/test_recipes.py."""
    for recipe in recipes():
        lora, _, rest = recipe.scale.partition('-')
        gpus = gpus_of(recipe.name)
        assert lora == ('lora' if '_lora_' in recipe.name else f'{gpus}gpus' if gpus > 1 else '1gpu')
        assert (f'_{rest}_' in recipe.name) if rest else '_zero' not in recipe.name


def test_what_is_unknown_and_what_nothing_has(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(['configs', '--model', 'sd33'])
    assert stopped.value.code == 2 and "--model: 'sd33' is unknown; did you mean 'sd3'?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(['configs', '--scale', 'quantum'])
    assert "'quantum' is unknown; there are 1gpu" in capsys.readouterr().err
    assert main(['configs', '--model', 'flux', '--method', 'dmd2']) == 1
    assert 'no recipe has all of that' in capsys.readouterr().out
