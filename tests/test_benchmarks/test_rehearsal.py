"""The dress rehearsal with one block of each network: every step from the build to the card's own code."""
import ast
import contextlib
import dataclasses
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from cdm_plugin.cli import main

CONFIG = 'model.backbone.config.'
ONE_BLOCK = {
    'sd3-medium': dict(num_layers=1, num_attention_heads=1, caption_projection_dim=64),
    'z-image': dict(dim=128, n_layers=1, n_refiner_layers=1, n_heads=1, n_kv_heads=1),
    'flux2-klein-4b': dict(num_layers=1, num_single_layers=1, num_attention_heads=1),
    'longcat-image': dict(num_layers=1, num_single_layers=1, num_attention_heads=1)}


@pytest.mark.slow
@pytest.mark.parametrize('name', list(ONE_BLOCK))
def test_every_step_from_the_build_to_diffusers(name, benchmark, monkeypatch, tmp_path, capsys):
    rehearsal = benchmark('rehearsal')
    model = rehearsal.MODELS[name]
    one_block = {CONFIG + key: value for key, value in ONE_BLOCK[name].items()}
    monkeypatch.setitem(rehearsal.MODELS, name, dataclasses.replace(model, keys={**model.keys, **one_block}))

    def child(arguments, log, cwd):
        """In this process: another one's imports take most of the time."""
        with open(log, 'w') as file, contextlib.redirect_stdout(file), monkeypatch.context() as patch:
            patch.chdir(cwd)
            if arguments[1] == '-m':
                assert main(arguments[3:]) == 0, log.read_text()
            else:
                runpy.run_path(arguments[1])
        return dict(seconds=1.5, gib=0.5)

    monkeypatch.setattr(rehearsal, 'child', child)
    rehearsal.build(rehearsal.MODELS[name], tmp_path / name)
    rows = rehearsal.rehearse(name, tmp_path / name, tmp_path / 'work', pixels=64, iterations=2, max_steps=2)
    assert [row['step'].split()[0] for row in rows] == ['doctor', 'train', 'resume', 'sample', 'export', 'open']
    assert 'GiB stay on each' in rows[1]['estimate']
    assert (tmp_path / 'work/run/iter_4.pth').is_file()
    with Image.open(tmp_path / 'work/lora/image.png') as image:
        assert image.size == (64, 64)
    assert capsys.readouterr().out.count('| 2 s | 0.5 GiB |') == 6 and json.dumps(rows)


def test_what_a_process_took(tmp_path):
    """Asked in a small process: a child counts the memory of its parent until it starts."""
    def run(code):
        script = f"""
import sys
from pathlib import Path
from rehearsal import child
print(child([sys.executable, '-c', {code!r}], Path('log'), Path.cwd()))"""
        return subprocess.run([sys.executable, '-c', script], cwd=tmp_path, capture_output=True, text=True,
                              env=dict(os.environ, PYTHONPATH=str(Path(__file__).parents[2] / 'benchmarks')))

    took = ast.literal_eval(run('import time; x = b"x" * 2**28; time.sleep(0.2)').stdout)
    assert 0.2 < took['seconds'] < 30 and 0.25 < took['gib'] < 0.3
    assert re.search('RuntimeError: .* has failed:\nno such thing', run('raise SystemExit("no such thing")').stderr)
