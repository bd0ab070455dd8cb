"""Replaces what an export folder has of an earlier export, whole or not at all, even if the process is killed."""
import contextlib
import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import IO, Iterable, Iterator, List

from cdm_plugin.backbones.base import PARTS_FILE
from cdm_plugin.export.job import INDEX_FILE

try:
    import fcntl
except ImportError:  # not a Unix: what a killed run leaves is not removed there
    fcntl = None

# While a folder's content is replaced, the earlier one lies in this folder of it.
PREVIOUS = '.cdm_previous'
# Says in PREVIOUS what is replaced by what; without it nothing is to be put back.
JOURNAL = 'journal.json'
# Marks a staging folder as one of these, and is locked as long as its run lives.
LOCK = 'cdm_export.lock'


@contextlib.contextmanager
def staged(folder: Path, own_names: List[str]) -> Iterator[Path]:
    """A folder to write to, whose content replaces an earlier export in the given one once all is written.

    Args:
        folder (Path): Where the content goes; made if need be.
        own_names (list[str]): What is removed of an earlier export, whether or not there is a new one.
    """
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    put_back(folder)
    _remove_leftovers(folder)
    staging = Path(tempfile.mkdtemp(prefix=f'.{folder.name}-', dir=folder.parent))
    try:
        with open(staging / LOCK, 'w') as lock:
            _try_lock(lock)
            new = staging / 'new'
            new.mkdir()
            yield new
            _replace(folder, new, own_names)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def was_interrupted(folder: Path) -> bool:
    """Whether a run was killed while it replaced the folder's content, which thus is an export's."""
    return (folder / PREVIOUS).is_dir()


def put_back(folder: Path) -> None:
    """Undoes a replacement that was not completed; it may be interrupted and repeated itself."""
    previous = folder / PREVIOUS
    if not previous.is_dir():
        return
    journal = previous / JOURNAL
    if journal.is_file():
        names = json.loads(journal.read_text())
        for name in _parts_last({*names['old'], *names['new']}):
            if os.path.lexists(previous / name):
                _remove(folder / name)
                os.rename(previous / name, folder / name)
            elif name not in names['old']:
                _remove(folder / name)
        journal.unlink()
    shutil.rmtree(previous)


def _replace(folder: Path, new: Path, own_names: List[str]) -> None:
    made = not folder.exists()
    folder.mkdir(exist_ok=True)
    names = _parts_last(path.name for path in new.iterdir())
    old = [name for name in _parts_last({*own_names, *names}) if os.path.lexists(folder / name)]
    previous = folder / PREVIOUS
    try:
        previous.mkdir()
        (previous / 'unfinished').write_text(json.dumps(dict(old=old, new=names)))
        os.rename(previous / 'unfinished', previous / JOURNAL)  # at once, so that it is never half written
        for name in reversed(old):
            os.rename(folder / name, previous / name)
        for name in names:
            shutil.move(str(new / name), str(folder / name))
        (previous / JOURNAL).unlink()  # from here on the new content stays
    except BaseException:
        put_back(folder)
        if made and not any(folder.iterdir()):
            folder.rmdir()
        raise
    shutil.rmtree(previous, ignore_errors=True)


def _parts_last(names: Iterable[str]) -> List[str]:
    """The order in which files come, and in reverse go: a folder that opens is complete."""
    return sorted(names, key=lambda name: (name == PARTS_FILE, name == INDEX_FILE, name))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _remove_leftovers(folder: Path) -> None:
    """Removes staging folders beside the folder whose runs are dead."""
    pattern = re.compile(re.escape(f'.{folder.name}-') + '[a-z0-9_]{8}')  # as tempfile names them
    for staging in folder.parent.iterdir():
        if pattern.fullmatch(staging.name) and (staging / LOCK).is_file():
            with contextlib.suppress(OSError), open(staging / LOCK, 'r+') as lock:  # somebody else's, for example
                if _try_lock(lock):
                    shutil.rmtree(staging, ignore_errors=True)


def _try_lock(file: IO[str]) -> bool:
    """Whether the file is locked now by this process, until it closes it or dies."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # a living run has it, or the file system knows no locks
        return False
    return True
