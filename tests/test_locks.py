"""One run at a time in a folder."""
import json
import os
import signal
import threading
import time

import pytest
from recipes import CDM

from cdm_plugin import locks
from cdm_plugin.cli import main
from cdm_plugin.locks import LOCK, FolderInUse, held, take


class Owner:
    """A process of its own that has the folder, and one that it has forked (as for loading data), which outlives it."""

    def __init__(self, folder):
        self.told, write = os.pipe()
        read, self.tell = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                take(folder, 'cdm train')
                if os.fork() == 0:
                    time.sleep(3)
                    os._exit(0)
                os.write(write, b'taken')
                os.read(read, 1)
                locks._release_all()  # what the end of an interpreter calls
            finally:
                os._exit(0)
        assert os.read(self.told, 5) == b'taken'

    def end(self):
        os.write(self.tell, b'.')
        os.waitpid(self.pid, 0)

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


@pytest.fixture(params=['locks', 'no locks'])
def system(request, monkeypatch):
    """A file system with locks, and one without."""
    if request.param == 'no locks':
        monkeypatch.setattr(locks, '_try_lock', lambda handle: None)
    return request.param


def test_a_living_owner_is_named_and_a_dead_one_is_not_in_the_way(system, tmp_path):
    process = Owner(tmp_path)
    with pytest.raises(FolderInUse) as caught:
        take(tmp_path, 'cdm train')
    text = str(caught.value)
    assert f'cdm train, process {process.pid} on {os.uname().nodename}' in text and '\n' not in text
    assert time.strftime('since %Y-') in text and f'delete {tmp_path / LOCK}' in text
    process.kill()
    assert (tmp_path / LOCK).exists()
    with held(tmp_path, 'cdm train'):
        assert json.loads((tmp_path / LOCK).read_text())['pid'] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_ends_by_itself_leaves_nothing(system, tmp_path):
    process = Owner(tmp_path / 'a/b')
    process.end()
    assert list(tmp_path.iterdir()) == []


def test_one_process_takes_a_folder_once_and_its_children_do_not_give_it_back(tmp_path):
    with held(tmp_path, 'outer'):
        with held(tmp_path / '.', 'inner'):
            assert take(tmp_path, 'again') is None
        assert (tmp_path / LOCK).exists()
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                locks._release_all()
                take(tmp_path, 'child')
            except FolderInUse:
                status = 0
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0 and (tmp_path / LOCK).exists()
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_has_the_number_of_a_dead_one_is_another(monkeypatch, tmp_path):
    process = Owner(tmp_path)
    owner = json.loads((tmp_path / LOCK).read_text())
    process.kill()
    monkeypatch.setattr(locks, '_try_lock', lambda handle: None)
    for changed, alive in ((dict(pid=os.getppid()), False),
                           (dict(pid=os.getppid(), started=locks._started(os.getppid())), True)):
        (tmp_path / LOCK).write_text(json.dumps(dict(owner, **changed)))
        if alive:
            with pytest.raises(FolderInUse):
                take(tmp_path, 'x')
        else:
            take(tmp_path, 'x').release()


@pytest.mark.parametrize('end', ['lives', 'died', 'ends meanwhile'])
def test_an_owner_on_another_machine_is_known_by_its_signs_of_life(end, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(locks, 'PATIENCE', 0.5)
    file = tmp_path / LOCK
    file.write_text(json.dumps(dict(what='cdm train', host='elsewhere', pid=1, started='1', since='today', beat=0)))
    sign = dict(lives=lambda: file.write_text(file.read_text().replace('"beat": 0', '"beat": 1')),
                died=lambda: None)
    timer = threading.Timer(0.2, sign.get(end, file.unlink))
    timer.start()
    if end == 'lives':
        with pytest.raises(FolderInUse, match='cdm train, process 1 on elsewhere, writes to it since today'):
            take(tmp_path, 'cdm train')
    else:
        take(tmp_path, 'cdm train').release()
        assert not file.exists()
    timer.join()
    assert 'another machine, elsewhere' in capsys.readouterr().out


def test_a_run_gives_signs_of_life(monkeypatch, tmp_path):
    monkeypatch.setattr(locks, 'BEAT', 0.02)
    with held(tmp_path, 'x'):
        first = os.pread(locks._held[tmp_path / LOCK].handle, 1000, 0)
        time.sleep(0.2)
        assert os.pread(locks._held[tmp_path / LOCK].handle, 1000, 0) != first
    assert not any(thread.name == 'cdm lock' for thread in threading.enumerate())


def test_a_file_that_says_nothing_names_nobody(tmp_path):
    for text in ('', '{', '[1]', 'null'):
        (tmp_path / LOCK).write_text(text)
        take(tmp_path, 'x').release()


@pytest.mark.parametrize('command', [
    ['train', CDM, '--work-dir'], ['evaluate', CDM, '--prompts', 'prompts.txt', '--metrics', 'DigitMetric', '--out']])
def test_commands_say_at_once_that_a_folder_is_in_use(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'prompts.txt').write_text('3\n')
    owner = Owner(tmp_path / 'run')
    assert main([*command, 'run']) == 2
    assert f'{tmp_path}/run is in use: cdm train, process {owner.pid} on' in capsys.readouterr().err
    assert [path.name for path in (tmp_path / 'run').iterdir()] == [LOCK]
    owner.end()
