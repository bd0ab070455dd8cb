"""From which checkpoint a run resumes if some are damaged."""
import logging
import os

import pytest
import torch
from test_compat.test_checkpoints import flip, place_of

from cdm_plugin.compat import good_checkpoint
from cdm_plugin.compat.checkpoints import CheckpointError, save_checkpoint
from cdm_plugin.compat.good_checkpoint import find_good_checkpoint
from cdm_plugin.engine.shard_files import write

WEIGHT = torch.arange(100.0)
COMMON = dict(world_size=1, shapes={}, state_dict={})


@pytest.fixture
def work_dir(tmp_path):
    """Two runs of one work_dir: the second, whose last checkpoint is iter_10.pth, has replaced some of the first's."""
    for name in ('iter_4.pth', 'iter_9.pth', 'iter_10.pth', 'iter_12.pth', 'best_x_iter_9.pth', 'epoch_9.pth'):
        save_checkpoint(dict(w=WEIGHT), str(tmp_path / name))
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'iter_10.pth'))
    return tmp_path


@pytest.fixture
def said(monkeypatch):
    """What was logged as a warning."""
    texts = []
    monkeypatch.setattr(good_checkpoint, 'print_log',
                        lambda text, logger, level: texts.append(text) if level == logging.WARNING else None)
    return texts


def flipped(file):
    flip(file, place_of(file, WEIGHT) + 50)


def cut_short(file):
    os.truncate(file, file.stat().st_size // 2)


def emptied(file):
    file.write_bytes(b'')


@pytest.mark.parametrize('harm', [flipped, cut_short, emptied])
def test_the_latest_good_one_before_the_damaged_is_taken_and_both_are_named(harm, work_dir, said):
    path = str(work_dir)
    assert find_good_checkpoint(path) == str(work_dir / 'iter_10.pth') and said == []
    harm(work_dir / 'iter_10.pth')
    assert find_good_checkpoint(path) == str(work_dir / 'iter_9.pth')
    harm(work_dir / 'iter_9.pth')
    said.clear()
    assert find_good_checkpoint(path) == str(work_dir / 'iter_4.pth')
    assert [name for text in said for name in ('iter_10.pth', 'iter_9.pth') if f'{name} is damaged (' in text] == [
        'iter_10.pth', 'iter_9.pth'] and all('resumes from' in text and 'iter_4.pth' in text for text in said)
    harm(work_dir / 'iter_4.pth')
    with pytest.raises(CheckpointError, match='every checkpoint of .*iter_10.pth: .*iter_4.pth: ') as caught:
        find_good_checkpoint(path)
    assert '\n' not in str(caught.value)


def test_no_checkpoint_and_a_remote_one_stay_what_they_were(tmp_path):
    assert find_good_checkpoint(str(tmp_path)) is None
    (tmp_path / 'last_checkpoint').write_text('s3://bucket/run/iter_4.pth')
    assert find_good_checkpoint(str(tmp_path)) == 's3://bucket/run/iter_4.pth'


def test_a_folder_of_shards_is_looked_through(work_dir, said):
    for step in (20, 30):
        write(work_dir / f'iter_{step}.pth', 0, COMMON, dict(weights=dict(w=WEIGHT)),
              lambda value: [value])
    (work_dir / 'last_checkpoint').write_text('iter_30.pth')
    assert find_good_checkpoint(str(work_dir)) == str(work_dir / 'iter_30.pth')
    flipped(work_dir / 'iter_30.pth/rank_0.pth')
    assert find_good_checkpoint(str(work_dir)) == str(work_dir / 'iter_20.pth')
    assert 'iter_30.pth is damaged (rank_0.pth: data/0 differs from its checksum)' in said[-1]
    (work_dir / 'iter_20.pth/rank_0.pth').unlink()
    assert find_good_checkpoint(str(work_dir)) == str(work_dir / 'iter_12.pth')
    assert 'it has no rank_0.pth' in said[-1]


def test_a_folder_between_its_two_names_is_found(work_dir):
    write(work_dir / 'iter_30.pth', 0, COMMON, {}, lambda value: [value])
    (work_dir / 'last_checkpoint').write_text('iter_30.pth')
    (work_dir / 'iter_30.pth').rename(work_dir / 'iter_30.pth.old')
    assert find_good_checkpoint(str(work_dir)) == str(work_dir / 'iter_30.pth.old')
