"""Replaces what an export folder has of an earlier export, whole or not at all, even if the process is killed."""
import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from cdm_plugin.backbones.parts import PARTS_FILE
from cdm_plugin.export.job import INDEX_FILE
from cdm_plugin.files import full_disk_named, inside, remove, sync_tree, whole_file
from cdm_plugin.locks import held

# While a folder's content is replaced, the earlier one lies in this folder of it.
PREVIOUS = '.cdm_previous'
# Says in PREVIOUS what is replaced by what; without it nothing is to be put back.
JOURNAL = 'journal.json'
# Marks a staging folder as one of these.
MARK = 'cdm_export.lock'


@contextlib.contextmanager
def staged(folder: Path, own_names: list[str]) -> Iterator[Path]:
    """A folder to write to, whose content replaces an earlier export in the given one once all is written.

    Args:
        folder (Path): Where the content goes; made if need be.
        own_names (list[str]): What is removed of an earlier export, whether or not there is a new one.

    Raises:
        FolderInUse: If another process that lives exports to it.
    """
    folder = folder.resolve()
    with held(folder, 'an export', folder.with_name(f'.{folder.name}.cdm_lock')):
        put_back(folder)
        _remove_leftovers(folder)
        staging = Path(tempfile.mkdtemp(prefix=f'.{folder.name}-', dir=folder.parent))
        try:
            (staging / MARK).touch()
            new = staging / 'new'
            new.mkdir()
            with full_disk_named(folder):
                yield new
                sync_tree(new)
                _replace(folder, new, own_names)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def was_interrupted(folder: Path) -> bool:
    """Whether a run was killed while it replaced the folder's content, which thus is an export's."""
    return (folder / PREVIOUS).is_dir()


def put_back(folder: Path) -> None:
    """Undoes a replacement that was not completed; it may be interrupted and repeated itself."""
    previous = folder / PREVIOUS
    if not previous.is_dir() or previous.is_symlink():  # a link is nothing that an export left
        return
    journal = previous / JOURNAL
    if journal.is_file():
        names = json.loads(journal.read_text())
        for name in (*names['old'], *names['new']):  # before any of them is touched: the folder may be a stranger's
            inside(folder, name, journal, links=False)
        for name in _parts_last({*names['old'], *names['new']}):
            if os.path.lexists(previous / name):
                remove(folder / name)
                os.rename(previous / name, folder / name)
            elif name not in names['old']:
                remove(folder / name)
        journal.unlink()
    shutil.rmtree(previous)


def _replace(folder: Path, new: Path, own_names: list[str]) -> None:
    made = not folder.exists()
    folder.mkdir(exist_ok=True)
    names = _parts_last(path.name for path in new.iterdir())
    old = [name for name in _parts_last({*own_names, *names}) if os.path.lexists(folder / name)]
    previous = folder / PREVIOUS
    try:
        previous.mkdir()
        with whole_file(previous / JOURNAL) as part:
            part.write_text(json.dumps(dict(old=old, new=names)))
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


def _parts_last(names: Iterable[str]) -> list[str]:
    """The order in which files come, and in reverse go: a folder that opens is complete."""
    return sorted(names, key=lambda name: (name == PARTS_FILE, name == INDEX_FILE, name))


def _remove_leftovers(folder: Path) -> None:
    """Removes staging folders beside the folder: whoever wrote to them is dead, because this process has the lock."""
    pattern = re.compile(re.escape(f'.{folder.name}-') + '[a-z0-9_]{8}')  # as tempfile names them
    for staging in folder.parent.iterdir():
        if pattern.fullmatch(staging.name) and (staging / MARK).is_file():
            shutil.rmtree(staging, ignore_errors=True)
