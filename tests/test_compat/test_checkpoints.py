import io
import os
import re
import threading
import time
import zipfile
from pathlib import Path

import pytest
import torch
from mmengine.fileio import LocalBackend, register_backend
from mmengine.fileio.backends import backends
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader
from mmengine.runner.checkpoint import _load_checkpoint
from tests_support import same_bits

from cdm_plugin import compat
from cdm_plugin.compat import checkpoints
from cdm_plugin.compat.checkpoints import (
    CheckpointError,
    damage,
    load_from_local,
    load_mapped,
    register_format,
    save_checkpoint,
)

TRUST = 'CDM_TRUST_CHECKPOINTS'


class Marker:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path, )


def test_objects_are_unpickled_only_on_request(tmp_path, monkeypatch):
    monkeypatch.delenv(TRUST, raising=False)
    file, trace = tmp_path / 'foreign.pth', tmp_path / 'ran'
    torch.save(dict(state_dict=dict(w=torch.ones(1)), extra=Marker(trace)), file)
    with pytest.raises(RuntimeError) as caught:
        _load_checkpoint(str(file))
    message = str(caught.value)
    assert str(file) in message and f'{TRUST}=1' in message and '\n' not in message
    assert not trace.exists()
    monkeypatch.setenv(TRUST, '1')
    assert torch.equal(_load_checkpoint(str(file))['state_dict']['w'], torch.ones(1))
    assert trace.exists()


def test_checkpoint_of_stock_mmengine_names_history_buffer(tmp_path, monkeypatch):
    monkeypatch.delenv(TRUST, raising=False)
    save_checkpoint(dict(message_hub=dict(log_scalars=dict(loss=HistoryBuffer([1.0], [1])))), str(tmp_path / 'a.pth'))
    with pytest.raises(RuntimeError, match=f'history_buffer.HistoryBuffer.*{TRUST}=1'):
        _load_checkpoint(str(tmp_path / 'a.pth'))
    monkeypatch.setenv(TRUST, '1')
    assert _load_checkpoint(str(tmp_path / 'a.pth'))['message_hub']['log_scalars']['loss'].current() == 1.0


def harmed(data, kind):
    middle = len(data) // 2
    return dict(
        truncated=data[:middle], empty=b'', text=b'<html>not found</html>', head=data[:1],
        overwritten=data[:64] + bytes(1000) + data[1064:])[kind]


@pytest.mark.parametrize('kind, legacy', [
    ('truncated', False), ('truncated', True), ('head', False), ('head', True), ('overwritten', False),
    ('empty', False), ('text', False)])
def test_damaged_checkpoint_is_one_clear_line(tmp_path, kind, legacy):
    file = tmp_path / 'iter_2.pth'
    torch.save(dict(w=torch.arange(1000.0)), file, _use_new_zipfile_serialization=not legacy)
    file.write_bytes(harmed(file.read_bytes(), kind))
    with pytest.raises(RuntimeError, match='is damaged or was cut short: copy it again, or delete it') as caught:
        _load_checkpoint(str(file))
    assert str(file) in str(caught.value) and '\n' not in str(caught.value)


def test_other_errors_of_loading_are_not_called_damage(tmp_path):
    torch.save(dict(w=torch.ones(1)), tmp_path / 'a.pth')

    def broken(storage, location):
        raise RuntimeError('no such device')

    with pytest.raises(RuntimeError, match='^no such device$'):
        _load_checkpoint(str(tmp_path / 'a.pth'), map_location=broken)


def test_missing_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / 'no.pth'))):
        _load_checkpoint(str(tmp_path / 'no.pth'))


def test_loader_of_the_host_stays(monkeypatch):
    monkeypatch.setattr(CheckpointLoader, '_schemes', dict(CheckpointLoader._schemes))

    def load_from_cluster(filename, map_location):
        return 'from the cluster'

    CheckpointLoader.register_scheme(prefixes='', loader=load_from_cluster, force=True)
    compat.apply()
    assert _load_checkpoint('any.pth') == 'from the cluster'


def test_a_killed_save_leaves_the_old_file_whole(tmp_path, monkeypatch):
    file = tmp_path / 'iter_4.pth'
    backend = LocalBackend()
    backend.put(b'old', file)
    with monkeypatch.context() as patch:
        patch.setattr(os, 'replace', lambda *paths: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            backend.put(b'new', file)
    assert file.read_bytes() == b'old'
    backend.put(b'new', file)
    assert file.read_bytes() == b'new'


def test_a_save_that_fails_leaves_the_old_checkpoint_and_nothing_else(tmp_path):
    file = tmp_path / 'run/iter_4.pth'
    save_checkpoint(dict(w=torch.zeros(2)), str(file))
    with pytest.raises(AttributeError):
        save_checkpoint(dict(w=torch.ones(1000), bad=lambda: None), str(file))
    assert torch.equal(torch.load(file)['w'], torch.zeros(2)) and os.listdir(file.parent) == ['iter_4.pth']


def test_a_local_checkpoint_is_not_built_in_memory(tmp_path, monkeypatch):
    """What torch writes to is the file itself. How much memory that takes is measured in test_memory.py."""
    save, targets = torch.save, []
    monkeypatch.setattr(torch, 'save', lambda obj, target: (targets.append(target.name), save(obj, target)))
    save_checkpoint(dict(w=torch.ones(2)), str(tmp_path / 'a.pth'))
    assert targets == [str(tmp_path / 'a.pth.part')]
    assert torch.equal(torch.load(tmp_path / 'a.pth')['w'], torch.ones(2))


@pytest.fixture
def remote(monkeypatch):
    """A backend of one's own, and what was put there."""
    put = {}

    @register_backend('cdm_test_remote')
    class Remote(LocalBackend):
        def put(self, obj, filepath):
            put[filepath] = obj

    yield put
    backends.pop('cdm_test_remote')


def test_other_backends_get_what_they_always_got(remote, tmp_path, monkeypatch):
    save_checkpoint(dict(w=torch.ones(2)), 'b.pth', backend_args=dict(backend='cdm_test_remote'))
    assert torch.equal(torch.load(io.BytesIO(remote['b.pth']))['w'], torch.ones(2))
    with monkeypatch.context() as patch:  # the host's own way to write local files
        patch.setattr(LocalBackend, 'put', lambda self, obj, filepath: remote.update({filepath: obj}))
        save_checkpoint(dict(w=torch.zeros(2)), 'c.pth')
    assert torch.equal(torch.load(io.BytesIO(remote['c.pth']))['w'], torch.zeros(2))
    save_checkpoint(dict(w=torch.ones(2)), str(tmp_path / 'd.pth'), file_client_args=dict(backend='disk'))
    assert torch.equal(torch.load(tmp_path / 'd.pth')['w'], torch.ones(2))


def is_mapped(tensor, file):
    """Whether a tensor lies in a mapping of the file, as the kernel lists them."""
    for line in Path('/proc/self/maps').read_text().splitlines():
        start, end = (int(x, 16) for x in line.split()[0].split('-'))
        if start <= tensor.data_ptr() < end:
            return line.endswith(str(file))
    return False


@pytest.mark.parametrize('legacy', [False, True])
def test_a_mapped_checkpoint_stays_on_the_disk(legacy, tmp_path):
    file = tmp_path / 'a.pth'
    torch.save(dict(w=torch.arange(1000.0)), file, _use_new_zipfile_serialization=not legacy)
    weight = load_mapped(str(file))['w']
    assert torch.equal(weight, torch.arange(1000.0)) and is_mapped(weight, file) != legacy
    assert not is_mapped(load_from_local(str(file))['w'], file)
    weight.zero_()  # the file is not written to
    assert torch.equal(torch.load(file)['w'], torch.arange(1000.0))
    save_checkpoint(dict(w=torch.ones(3)), str(file))  # nor does a new one change what was read
    assert torch.equal(weight, torch.zeros(1000))


def test_a_mapped_checkpoint_comes_from_the_hosts_loader_and_from_urls(tmp_path, monkeypatch):
    monkeypatch.setattr(CheckpointLoader, '_schemes', dict(CheckpointLoader._schemes))
    for prefix in ('', 'cdmtest://'):
        CheckpointLoader.register_scheme(prefixes=prefix, loader=lambda name, map_location: (name, map_location),
                                         force=True)
    assert load_mapped('any.pth') == ('any.pth', 'cpu') and load_mapped('cdmtest://x') == ('cdmtest://x', 'cpu')


def test_folders_of_a_registered_format_load(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, '_formats', list(checkpoints._formats))
    register_format(lambda path: Path(path, 'mine').is_file(), lambda path: dict(read=path))
    (tmp_path / 'a').mkdir()
    with pytest.raises(FileNotFoundError, match='There is no checkpoint'):
        _load_checkpoint(str(tmp_path / 'a'))
    (tmp_path / 'a/mine').touch()
    assert _load_checkpoint(str(tmp_path / 'a')) == dict(read=str(tmp_path / 'a'))


# Checksums


def flip(file, position, bit=0):
    """One bit of a file is another one."""
    data = bytearray(file.read_bytes())
    data[position] ^= 1 << bit
    file.write_bytes(data)


def place_of(file, tensor):
    """Where a tensor's bytes lie in a file."""
    return file.read_bytes().index(tensor.numpy().tobytes())


def test_a_flipped_bit_anywhere_is_found_or_changes_nothing(tmp_path):
    """torch.load takes all of those in a weight."""
    file = tmp_path / 'iter_2.pth'
    state = dict(state_dict=dict(w=torch.randn(1000), v=torch.randn(7)), meta=dict(iter=2))
    save_checkpoint(state, str(file))
    whole, generator, taken = file.read_bytes(), torch.Generator().manual_seed(0), 0
    for position in torch.randperm(len(whole), generator=generator)[:300].tolist():
        flip(file, position, position % 8)
        if damage(str(file)) is None:
            taken += 1
            same_bits(load_from_local(str(file)), state)
        else:
            with pytest.raises(CheckpointError, match='damaged'):
                load_from_local(str(file))
        file.write_bytes(whole)
    assert taken < 100 and damage(str(file)) is None
    flip(file, place_of(file, state['state_dict']['w']) + 3, bit=6)  # of a float's exponent
    assert float(torch.load(file)['state_dict']['w'][0]) != float(state['state_dict']['w'][0])
    for load in (load_from_local, load_mapped):
        with pytest.raises(CheckpointError, match=r'iter_2.pth is damaged .*\(data/0 differs from its checksum\)$'):
            load(str(file))


def test_a_checkpoint_is_read_once_for_its_checksums(tmp_path, monkeypatch):
    file, reads = tmp_path / 'a.pth', []
    testzip = zipfile.ZipFile.testzip
    monkeypatch.setattr(zipfile.ZipFile, 'testzip', lambda self: (reads.append(self.filename), testzip(self))[1])
    for value in (1, 2):
        save_checkpoint(dict(w=torch.full((9,), value)), str(file))
        assert damage(str(file)) is None and load_mapped(str(file))['w'][0] == value
    assert reads == [str(file)] * 2


def test_a_file_without_checksums_is_taken(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(dict(w=torch.ones(2)), tmp_path / 'a.pth')
    finally:
        torch.serialization.set_crc32_options(True)
    torch.save(dict(w=torch.ones(2)), tmp_path / 'b.pth', _use_new_zipfile_serialization=False)
    for name in 'ab':
        assert torch.equal(load_from_local(str(tmp_path / f'{name}.pth'))['w'], torch.ones(2))


@pytest.mark.slow
def test_the_check_of_a_gigabyte_takes_a_second_and_no_memory(tmp_path):
    def kilobytes():
        status = dict(line.split(':', 1) for line in Path('/proc/self/status').read_text().splitlines())
        return int(status['RssAnon'].split()[0])

    file = tmp_path / 'a.pth'
    save_checkpoint({str(i): torch.randn(16 << 20) for i in range(16)}, str(file))
    before, most, done = kilobytes(), [], threading.Event()

    def watch():
        while not done.wait(0.005):
            most.append(kilobytes())

    thread = threading.Thread(target=watch)
    thread.start()
    times = {}
    for what, call in (('check', damage), ('mapped load', lambda name: torch.load(name, mmap=True))):
        start = time.perf_counter()
        result = call(str(file))
        times[what] = time.perf_counter() - start
        assert what != 'check' or result is None
    done.set()
    thread.join()
    start = time.perf_counter()
    torch.load(file)
    times['load into memory'] = time.perf_counter() - start
    print(', '.join(f'{what} {seconds:.2f} s' for what, seconds in times.items()),
          f'; memory of the check {(max(most) - before) / 1024:.0f} MB')
    assert max(most) - before < 30 * 1024 and times['check'] < 10
