"""Files and folders that are whole or not there, whatever happens meanwhile; which checkpoint is the latest."""
import errno
import logging
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from cdm_plugin import files as files_module
from cdm_plugin.files import clear_parts, find_latest_checkpoint, full_disk, whole_file, whole_folder


def make_work_dir(path, named, files):
    path.mkdir(exist_ok=True)
    for file in files:
        (path / file).touch()
    if named is not None:
        (path / 'last_checkpoint').write_text(str(named))
    return str(path)


@pytest.mark.parametrize('files, expected', [
    (['iter_4.pth', 'iter_6.pth'], 'iter_4.pth'),
    (['iter_9.pth', 'iter_10.pth', 'epoch_30.pth', 'iter_x.pth', 'iter_99.pth.tmp'], 'iter_10.pth'),
    (['epoch_2.pth', 'best_iter_4.pth'], 'epoch_2.pth'),
    (['best_iter_4.pth'], None),
    ([], None),
])
def test_latest_checkpoint_of_a_copied_work_dir(tmp_path, files, expected):
    original = tmp_path / 'original'
    make_work_dir(original, original / 'iter_4.pth', ['iter_4.pth'])
    copy = make_work_dir(tmp_path / 'copy', original / 'iter_4.pth', files)
    assert find_latest_checkpoint(copy) == (None if expected is None else os.path.join(copy, expected))


def test_missing_last_checkpoint_is_said(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(files_module, 'print_log', lambda text, logger, level: said.append((text, level)))
    find_latest_checkpoint(make_work_dir(tmp_path, 'gone/iter_8.pth', ['iter_4.pth']))
    (text, level), = said
    assert 'iter_8.pth, named by last_checkpoint, is missing' in text and 'iter_4.pth' in text
    assert level == logging.WARNING


def test_latest_checkpoint_without_last_checkpoint_or_directory(tmp_path):
    assert find_latest_checkpoint(str(tmp_path)) is None
    assert find_latest_checkpoint(str(tmp_path / 'none')) is None
    assert find_latest_checkpoint(make_work_dir(tmp_path, None, ['iter_3.pth'])) == str(tmp_path / 'iter_3.pth')


def test_latest_checkpoint_in_out_dir_or_remote(tmp_path):
    apart = tmp_path / 'out' / 'run'
    apart.mkdir(parents=True)
    (apart / 'iter_4.pth').touch()
    work_dir = make_work_dir(tmp_path / 'run', apart / 'iter_4.pth', [])
    assert find_latest_checkpoint(work_dir) == str(apart / 'iter_4.pth')
    work_dir = make_work_dir(tmp_path / 'remote', 's3://bucket/run/iter_4.pth', [])
    assert find_latest_checkpoint(work_dir) == 's3://bucket/run/iter_4.pth'


# Whole or not at all


def names(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob('*'))


def fill(part, text):
    """What a block writes: a file, or a folder with one file at the top and one below."""
    if part.is_dir():
        (part / 'below').mkdir()
        (part / 'a').write_text(text)
        (part / 'below/b').write_text(text)
    else:
        part.write_text(text)


def content(path):
    return {str(p.relative_to(path)): p.read_text() for p in (path, *path.rglob('*')) if p.is_file()}


@pytest.fixture(params=[whole_file, whole_folder], ids=['file', 'folder'])
def write(request):
    return request.param


def test_what_was_there_is_replaced_and_folders_are_made(write, tmp_path):
    path = tmp_path / 'x/y/thing'
    for text in ('old', 'new'):
        with write(path) as part:
            assert part.parent == path.parent and part != path  # a rename within one file system is atomic
            assert not part.is_dir() or not list(part.iterdir())
            fill(part, text)
            assert (text == 'new') == path.exists()
        assert set(content(path).values()) == {text}
        assert [p.name for p in path.parent.iterdir()] == ['thing']


@pytest.mark.parametrize('error', [OSError, KeyboardInterrupt])
def test_a_block_that_fails_leaves_what_was_there(write, error, tmp_path):
    path = tmp_path / 'thing'
    with pytest.raises(error), write(path) as part:
        fill(part, 'first')
        raise error
    assert names(tmp_path) == []
    with write(path) as part:
        fill(part, 'old')
    before = content(path)
    with pytest.raises(error), write(path) as part:
        fill(part, 'new')
        raise error
    assert content(path) == before and [p.name for p in tmp_path.iterdir()] == ['thing']


@pytest.mark.parametrize('write, name, call', [
    (whole_file, 'fsync', 1), (whole_file, 'replace', 1), (whole_folder, 'fsync', 1), (whole_folder, 'rename', 1),
    (whole_folder, 'rename', 2)])
def test_a_full_disk_is_said_and_leaves_what_was_there(write, name, call, tmp_path, monkeypatch):
    path = tmp_path / 'thing'
    with write(path) as part:
        fill(part, 'old')
    before, calls, real = content(path), [], getattr(os, name)

    def full(*args):
        calls.append(args)
        if len(calls) == call:
            raise OSError(errno.ENOSPC, 'No space left on device')
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, name, full)
        with pytest.raises(OSError, match=f"No space left on device: '{path}'"), write(path) as part:
            fill(part, 'new')
    assert len(calls) >= call and content(path) == before and [p.name for p in tmp_path.iterdir()] == ['thing']


def safetensors_fails():
    """As its save_file does, which writes to no device."""
    raise SafetensorError('Error while serializing: I/O error: No space left on device (os error 28)')


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='needs a device that is always full')
@pytest.mark.parametrize('save', [
    lambda path: torch.save(dict(w=torch.zeros(100_000)), open(path, 'wb')),
    lambda path: safetensors_fails(),
    lambda path: Path(path).write_text('x' * 100_000)])
def test_what_libraries_make_of_a_full_disk_is_known(save, tmp_path):
    with pytest.raises(OSError) as caught, whole_file(tmp_path / 'thing') as part:
        part.symlink_to('/dev/full')
        save(part)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / 'thing'))
    assert not list(tmp_path.iterdir()) and full_disk(caught.value) is caught.value
    assert full_disk(ValueError('no')) is None and full_disk(OSError(errno.EACCES, 'no')) is None


def test_what_dead_processes_left_goes(tmp_path):
    for name in ('a.pth.part', 'b.pth', 'c.pth.old', 'd.pth', 'd.pth.old', 'e.txt.part'):
        (tmp_path / name).write_text(name)
    (tmp_path / 'f.pth.part').mkdir()
    (tmp_path / 'f.pth.part/x').write_text('')
    clear_parts(tmp_path, '.pth')
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        'b.pth': 'b.pth', 'c.pth': 'c.pth.old', 'd.pth': 'd.pth', 'e.txt.part': 'e.txt.part'}
    clear_parts(tmp_path)
    assert not (tmp_path / 'e.txt.part').exists()


@pytest.mark.parametrize('moment', ['writing', 'os.fsync', 'os.replace', 'os.rename', 'shutil.rmtree'])
def test_a_killed_process_leaves_one_of_them_whole(write, moment, tmp_path):
    path = tmp_path / 'thing'
    with write(path) as part:
        fill(part, 'old')
    pid = os.fork()
    if pid == 0:  # dies at once, without any cleaning up
        try:
            if moment != 'writing':
                module, name = moment.split('.')
                setattr(sys.modules[module], name, lambda *args, **kwargs: os._exit(9))
            with write(path) as part:
                fill(part, 'new')
                if moment == 'writing':
                    os._exit(9)
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    assert set(content(path).values()) in ({'old'}, {'new'})
    with write(path) as part:  # what the dead one left is in nobody's way, and goes
        fill(part, 'next')
    assert set(content(path).values()) == {'next'} and [p.name for p in tmp_path.iterdir()] == ['thing']


def test_a_folder_between_its_two_names_comes_back(tmp_path):
    """Two renames are not one: who dies between them leaves the earlier folder aside."""
    path = tmp_path / 'thing'
    with whole_folder(path) as part:
        fill(part, 'old')
    before = content(path)
    path.rename(tmp_path / 'thing.old')
    with pytest.raises(ZeroDivisionError), whole_folder(path):
        1 / 0
    assert content(path) == before and [p.name for p in tmp_path.iterdir()] == ['thing']


def test_it_is_on_the_disk_before_it_has_its_name(write, tmp_path, monkeypatch):
    events, fsync = [], os.fsync

    def synced(handle):
        events.append(os.path.basename(os.readlink(f'/proc/self/fd/{handle}')))
        fsync(handle)

    monkeypatch.setattr(os, 'fsync', synced)
    for name in ('replace', 'rename'):
        monkeypatch.setattr(os, name, lambda a, b, real=getattr(os, name): (real(a, b), events.append('named')))
    with write(tmp_path / 'thing') as part:
        fill(part, 'x')
    here = tmp_path.name
    assert events[-2:] == ['named', here]
    assert set(events[:-2]) == ({'thing.part'} if write is whole_file else {'a', 'b', 'below', 'thing.part'})


def test_a_file_system_that_cannot_sync_is_left_alone(write, tmp_path, monkeypatch):
    def unable(handle):
        raise OSError(errno.EINVAL, 'Invalid argument')

    monkeypatch.setattr(os, 'fsync', unable)
    with write(tmp_path / 'thing') as part:
        fill(part, 'x')
    assert set(content(tmp_path / 'thing').values()) == {'x'}


def test_a_folder_takes_the_place_of_a_file_and_of_a_link(tmp_path):
    (tmp_path / 'kept').mkdir()
    (tmp_path / 'kept/a').write_text('kept')
    (tmp_path / 'link').symlink_to(tmp_path / 'kept')
    (tmp_path / 'file').write_text('old')
    for name in ('link', 'file'):
        with whole_folder(tmp_path / name) as part:
            fill(part, 'new')
        assert (tmp_path / name / 'a').read_text() == 'new' and not (tmp_path / name).is_symlink()
    assert content(tmp_path / 'kept') == {'a': 'kept'}
