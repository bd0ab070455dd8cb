"""Captioned pictures in a run, from the files to the command line."""
import numpy as np
import pytest
from PIL import Image

from cdm_plugin.cli import main
from cdm_plugin.config import load_config

TEACHER = 'digits/teacher_flow-matching_sd3-digits_1xb128_6k.py'


@pytest.mark.parametrize('workers, place', [(0, 0), (0, 6), (1, 0), (1, 6)])
def test_a_broken_picture_is_one_line_in_any_iteration(workers, place, tmp_path, capsys):
    for i in range(8):
        Image.fromarray(np.full((16, 16, 3), i, np.uint8)).save(tmp_path / f'{i}.png')
    (tmp_path / f'{place}.png').write_text('<html>404 not found</html>')
    (tmp_path / 'p.csv').write_text('prompt,image\n' + ''.join(f'{i},{i}.png\n' for i in range(8)))
    cfg = load_config(TEACHER, {'log_level': 'ERROR', 'experiment_name': f'broken-picture-{workers}-{place}'})
    cfg.train_dataloader = dict(
        batch_size=2, num_workers=workers, sampler=dict(type='DefaultSampler', shuffle=False),
        dataset=dict(type='PromptDataset', ann_file='p.csv', data_root=str(tmp_path), data_prefix=dict(image=''),
                     pipeline=[dict(type='PackInputs', image='image', channels=1)]))
    cfg.dump(str(tmp_path / 'own.py'))
    assert main(['train', str(tmp_path / 'own.py'), '--work-dir', str(tmp_path / 'run'),
                 '--cfg-options', 'train_cfg.max_iters=4']) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith('cdm train: ') and f'{place}.png' in error and 'no readable image' in error
    assert len(error) < 500 and 'Traceback' not in error and 'Caught' not in error
