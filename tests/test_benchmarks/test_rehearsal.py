"""The dress rehearsal with one block of each kind of a network: every step from the build to the card's own code."""
import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
SMALL = {
    'sd3-medium': dict(num_layers=1, num_attention_heads=1, caption_projection_dim=64),
    'flux2-klein-4b': dict(num_layers=1, num_single_layers=1, num_attention_heads=1)}


def load():
    spec = importlib.util.spec_from_file_location('rehearsal', ROOT / 'benchmarks/rehearsal.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize('name', SMALL)
def test_every_step_from_the_build_to_diffusers(name, tmp_path, monkeypatch, capsys):
    rehearsal = load()
    model = rehearsal.MODELS[name]
    small = {f'model.backbone.config.{key}': value for key, value in SMALL[name].items()}
    model = dataclasses.replace(model, keys={**model.keys, **small})
    monkeypatch.setitem(rehearsal.MODELS, name, model)
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    rehearsal.build(model, tmp_path / 'base')
    rows = rehearsal.rehearse(name, tmp_path / 'base', tmp_path / 'work', pixels=64, iterations=2, max_steps=2)
    assert [row['step'].split()[0] for row in rows] == ['doctor', 'train', 'resume', 'sample', 'export', 'open']
    assert all(row['seconds'] > 0 and row['gib'] > 0.1 for row in rows)
    # VAE of 84 million weights in float32, as the doctor counts it.
    assert 'GiB stay on each' in rows[1]['estimate']
    assert (tmp_path / 'work/run/iter_4.pth').is_file()
    with Image.open(tmp_path / 'work/lora/image.png') as image:
        assert image.size == (64, 64)
    assert capsys.readouterr().out.count('| ') > 12 and json.dumps(rows)
