"""Folders that one run at a time writes to.

A run holds a folder by a file in it, which names the run and is gone when it has ended. Three things say whether the
one that it names lives:

- a lock of the operating system on that file, which ends with its process, however that ends;
- on the same machine its process, if the file system knows no locks;
- on another machine, which locks may not reach on such file systems, whether the file still changes: every `BEAT`
  seconds a living run writes to it.

So what a dead run has left is in nobody's way, and nothing has to be deleted by hand.
"""
import atexit
import contextlib
import datetime
import errno
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # not a Unix: there only the beat tells
    fcntl = None

LOCK = '.cdm_lock'
# Seconds between two signs of life, and without one, longer than NFS keeps what it has read.
BEAT, PATIENCE = 10.0, 75.0

# By file, what this process holds.
_held: dict[Path, 'Lock'] = {}


class FolderInUse(ValueError):
    """Another run writes to this folder."""


class Lock:
    """What this process holds until it ends or calls `release`; see `take`."""

    def __init__(self, file: Path, handle: int, what: str, made: list[Path]) -> None:
        self.file, self.handle, self.made, self.process = file, handle, made, os.getpid()
        self.owner = dict(what=what, host=socket.gethostname(), pid=self.process, started=_started(self.process),
                          since=datetime.datetime.now().isoformat(' ', 'seconds'))
        self._released = threading.Event()
        self._beat(0)
        self._beating = threading.Thread(target=self._keep_beating, daemon=True, name='cdm lock')
        self._beating.start()

    def _beat(self, count: int) -> None:
        text = json.dumps(dict(self.owner, beat=count)).encode()
        os.pwrite(self.handle, text, 0)
        os.ftruncate(self.handle, len(text))

    def _keep_beating(self) -> None:
        count = 0
        while not self._released.wait(BEAT):
            count += 1
            with contextlib.suppress(OSError):  # a full disk, for example: there is a next time
                self._beat(count)

    def release(self) -> None:
        """Gives the folder back. A copy in a forked process does nothing."""
        if self.process != os.getpid() or self._released.is_set():
            return
        self._released.set()
        self._beating.join()  # it writes to a number, which may be another file's afterwards
        del _held[self.file]
        with contextlib.suppress(OSError):  # the folder may be gone
            if _is_file_of(self.handle, self.file):
                self.file.unlink()
        os.close(self.handle)
        for folder in self.made:
            with contextlib.suppress(OSError):  # there is something in it now
                folder.rmdir()


def take(folder: str | Path, what: str, file: Path | None = None) -> Lock | None:
    """Takes a folder for this process. Of a run of several processes, the first one takes it for all.

    Args:
        folder (str or Path): Where; the folder of the file is made if need be.
        what (str): What the process does there, for whoever comes later.
        file (Path, optional): What names the owner. Default: `.cdm_lock` in the folder.

    Returns:
        Lock: To be released, which the end of the process does as well; None if this process has the folder already,
            or it is a file, of which the caller knows more to say.

    Raises:
        FolderInUse: If another run that lives has it.
    """
    folder = Path(folder).resolve()
    file = folder / LOCK if file is None else file
    if folder.is_file() or (file in _held and _held[file].process == os.getpid()):
        return None
    made = [path for path in file.parents if not path.exists()]
    while True:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            locked = _try_lock(handle)
            owner = _owner(handle)
            if locked is False or (owner and _lives(owner, handle, file)):
                raise FolderInUse(_describe(folder, file, owner))
            if not _is_file_of(handle, file):  # whoever had it has just removed it
                os.close(handle)
                continue
            _held[file] = Lock(file, handle, what, made)
        except BaseException:
            os.close(handle)
            raise
        return _held[file]


@contextlib.contextmanager
def held(folder: str | Path, what: str, file: Path | None = None) -> Iterator[None]:
    """The same for a block; arguments as for `take`."""
    lock = take(folder, what, file)
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


@atexit.register
def _release_all() -> None:
    for lock in list(_held.values()):
        lock.release()


def _try_lock(handle: int) -> bool | None:
    """Whether this process has the file now: False if another one has, None if the file system knows no locks.

    Locks of this kind belong to a process: its forked workers have none, and they work over NFS.
    """
    if fcntl is None:
        return None
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EACCES, errno.EAGAIN) else None
    return True


def _owner(handle: int) -> dict[str, Any] | None:
    """Who has written the file, if anybody has."""
    try:
        owner = json.loads(os.pread(handle, 10000, 0))
        return owner if isinstance(owner, dict) else None
    except ValueError:
        return None


def _lives(owner: dict[str, Any], handle: int, file: Path) -> bool:
    if owner.get('host') == socket.gethostname():
        return owner.get('pid') != os.getpid() and _started(owner.get('pid')) == owner.get('started') is not None
    print(f'{file} names a run on another machine, {owner.get("host")}: looking for {PATIENCE:.0f} s whether it lives',
          flush=True)
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and _is_file_of(handle, file):
        if _owner(handle) != owner:
            return True
        time.sleep(min(1, PATIENCE / 10))
    return False


def _started(process: Any) -> str | None:
    """When a process of this machine has started; None if there is none of that number."""
    try:
        state, *fields = Path(f'/proc/{process}/stat').read_text().rpartition(') ')[2].split()
    except OSError:
        return None
    return None if state in 'ZX' else fields[18]


def _is_file_of(handle: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(file))
    except FileNotFoundError:
        return False


def _describe(folder: Path, file: Path, owner: dict[str, Any] | None) -> str:
    owner = owner or {}
    return (f'{folder} is in use: {owner.get("what", "another run")}, process {owner.get("pid")} on '
            f'{owner.get("host")}, writes to it since {owner.get("since")}. Wait for it or end it, or choose another '
            f'folder; if there is no such process any more, delete {file}')
