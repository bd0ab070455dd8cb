"""The dress rehearsal with one block of each network: every step from the build to the card's own code."""
import contextlib
import dataclasses
import json
import runpy

import pytest
from PIL import Image

from cdm_plugin.cli import main

CONFIG = 'model.backbone.config.'
ONE_BLOCK = {
    'sd3-medium': dict(num_layers=1, num_attention_heads=1, caption_projection_dim=64),
    'z-image': dict(dim=128, n_layers=1, n_refiner_layers=1, n_heads=1, n_kv_heads=1),
    'flux2-klein-4b': dict(num_layers=1, num_single_layers=1, num_attention_heads=1),
    'longcat-image': dict(num_layers=1, num_single_layers=1, num_attention_heads=1)}


@pytest.fixture
def rehearse(benchmark, monkeypatch, tmp_path):
    """Builds a model of one block and rehearses it: its rows, after some checks."""
    rehearsal = benchmark('rehearsal')
    monkeypatch.setenv('OMP_NUM_THREADS', '1')

    def run(name):
        model = rehearsal.MODELS[name]
        one_block = {CONFIG + key: value for key, value in ONE_BLOCK[name].items()}
        model = dataclasses.replace(model, keys={**model.keys, **one_block})
        monkeypatch.setitem(rehearsal.MODELS, name, model)
        rehearsal.build(model, tmp_path / name)
        rows = rehearsal.rehearse(name, tmp_path / name, tmp_path / 'work', pixels=64, iterations=2, max_steps=2)
        assert [row['step'].split()[0] for row in rows] == ['doctor', 'train', 'resume', 'sample', 'export', 'open']
        # VAE of 84 million weights in float32, as the doctor counts it.
        assert 'GiB stay on each' in rows[1]['estimate']
        assert (tmp_path / 'work/run/iter_4.pth').is_file()
        with Image.open(tmp_path / 'work/lora/image.png') as image:
            assert image.size == (64, 64)
        return rows

    return run


@pytest.mark.slow
def test_every_step_from_the_build_to_diffusers(rehearse, capsys):
    rows = rehearse('sd3-medium')
    assert all(row['seconds'] > 0 and row['gib'] > 0.1 for row in rows)
    assert capsys.readouterr().out.count('| ') > 12 and json.dumps(rows)


@pytest.mark.slow
@pytest.mark.parametrize('name', [name for name in ONE_BLOCK if name != 'sd3-medium'])
def test_the_way_of_the_other_models(name, rehearse, benchmark, monkeypatch):
    """Without a process for each step, whose imports take most of the time."""

    def child(arguments, log, cwd):
        with open(log, 'w') as file, contextlib.redirect_stdout(file), monkeypatch.context() as patch:
            patch.chdir(cwd)
            if arguments[1] == '-m':
                assert main(arguments[3:]) == 0, log.read_text()
            else:
                runpy.run_path(arguments[1])
        return dict(seconds=0.0, gib=0.0)

    monkeypatch.setattr(benchmark('rehearsal'), 'child', child)
    rehearse(name)
