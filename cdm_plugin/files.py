"""Files and folders that are there whole or not at all, and the latest checkpoint of a work directory."""
import contextlib
import errno
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmengine.logging import print_log

NUMBERED = re.compile(r'(iter|epoch)_(\d+)\.pth')
# Folders of repositories in the hub's cache, whose files are links to their `blobs`.
HUB_FOLDERS = ('models--', 'datasets--')
# What a file system says that cannot bring a folder (or anything) to the disk by itself.
CANNOT_SYNC = (errno.EACCES, errno.EBADF, errno.EINVAL, errno.ENOTSUP, errno.EPERM)

# What it says when it is full, or has no more for this user.
FULL = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A file that gets its name when it is complete: whoever is killed while writing leaves the earlier one.

    One process at a time may write a file. What a killed one leaves, `<name>.part`, the next one overwrites.

    Args:
        path (str or Path): Where to; its folder is made.

    Yields:
        Path: Where to write instead. It is brought to the disk and renamed when the block ends, removed if it fails.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = part_of(path)
    part.unlink(missing_ok=True)  # a link, where a stranger made the folder, would lead the writing out of it
    try:
        with full_disk_named(path):
            yield part
            sync(part)
            os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextlib.contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """The same for a folder, made empty; it replaces what has its name.

    That takes two renames: whoever is killed between them leaves the earlier one as `<name>.old`, which the next one
    puts back first. Files that other processes put into the folder, at `part_of(path)`, are theirs to `sync`.
    """
    path = Path(path)
    part, old = part_of(path), path.with_name(f'{path.name}.old')
    if os.path.lexists(old) and not os.path.lexists(path):
        os.rename(old, path)
    remove(part)
    try:
        with full_disk_named(path):
            part.mkdir(parents=True)
            yield part
            sync_tree(part)
            remove(old)
            if os.path.lexists(path):
                os.rename(path, old)
            os.rename(part, path)
    except BaseException:
        remove(part)
        if os.path.lexists(old) and not os.path.lexists(path):
            os.rename(old, path)
        raise
    sync(path.parent)
    remove(old)


@contextlib.contextmanager
def full_disk_named(path: Path) -> Iterator[None]:
    """Whatever a library makes of a full disk, outside of the block it is an OSError that names what was written."""
    try:
        yield
    except Exception as error:
        full = full_disk(error)
        if full is None:
            raise
        raise OSError(full.errno, full.strerror, str(path)) from error


def full_disk(error: BaseException | None) -> OSError | None:
    """The full disk that has led to an error, if one has: torch and safetensors raise errors of their own for it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return error
        said = re.search(r'(?:os error|Errno) (\d+)', str(error))
        if said and int(said[1]) in FULL:
            return OSError(int(said[1]), os.strerror(int(said[1])))
        error = error.__cause__ or error.__context__
    return None


def clear_parts(folder: Path, suffix: str = '') -> None:
    """Removes what dead processes have left of files and folders that were to become whole; what was about to be
    replaced has its name again.

    Args:
        folder (Path): Where; nobody may write there now.
        suffix (str): Of the names that count, without that of the unfinished. Default: all.
    """
    for old in folder.glob(f'*{suffix}.old'):
        if not os.path.lexists(old.with_suffix('')):
            os.rename(old, old.with_suffix(''))
    for left in (*folder.glob(f'*{suffix}.part'), *folder.glob(f'*{suffix}.old')):
        remove(left)


def part_of(path: str | Path) -> Path:
    """What a file or folder is called before it is complete."""
    return Path(path).with_name(f'{Path(path).name}.part')


def sync(path: Path) -> None:
    """Brings a file, or the names in a folder, to the disk; a file system that cannot is left alone.

    Raises:
        OSError: If the data cannot be written after all, on a full disk for example.
    """
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in CANNOT_SYNC:
            raise


def sync_tree(folder: Path) -> None:
    """Brings a folder with all that is in it to the disk."""
    for path in (*folder.rglob('*'), folder):
        sync(path)


def remove(path: Path) -> None:
    """Removes a file or a folder, if there is one; of a link, the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def inside(folder: str | Path, name: Any, source: str | Path, links: bool = True) -> Path:
    """Where a name leads that stands in a file, or on the command line: nowhere but into the folder.

    Args:
        folder (str or Path): The folder.
        name (Any): A relative path, as it was read.
        source (str or Path): What it was read from, named in the error.
        links (bool): Whether a symbolic link on the way must stay inside too (those of the hub's cache may lead to its
            blobs). False is for names that are only removed, renamed or replaced. Default True.

    Raises:
        ValueError: If it is absolute, empty, no text, has `..` in it, or is a link that leads out.
    """
    path = Path(folder, name) if isinstance(name, str) else Path(folder)
    root = Path(folder).resolve()
    root = next((p for p in root.parents if p.name.startswith(HUB_FOLDERS) and (p / 'blobs').is_dir()), root)
    if path == Path(folder) or '\0' in name or Path(name).is_absolute() or '..' in path.relative_to(folder).parts or (
            links and root not in path.resolve().parents):
        raise ValueError(f'{source} names {name!r}, but it may only name what lies in its folder {str(folder)!r}')
    return path


def find_latest_checkpoint(path: str) -> str | None:
    """Finds the checkpoint from which a work_dir resumes: one of its own, wherever the directory was copied to.

    Args:
        path (str): The work_dir.

    Returns:
        str or None: The file that `last_checkpoint` names, inside `path`; the newest iter_N.pth or epoch_N.pth there
        if that one is missing; None if there is neither.
    """
    save_file = Path(path, 'last_checkpoint')
    named = save_file.read_text().strip() if save_file.is_file() else ''
    found = relocate(named, path) if named else None
    if found is not None:
        return found
    found = _newest_numbered(path, os.path.basename(named))
    if found is not None:
        reason = f'{os.path.basename(named)}, named by last_checkpoint, is missing' if named else 'no last_checkpoint'
        print_log(f'{path}: {reason}; the newest checkpoint there is {found}', logger='current', level=logging.WARNING)
    elif not named:
        print_log('Did not find last_checkpoint to be resumed.')
    return found


def relocate(named: str, work_dir: str) -> str | None:
    """The checkpoint `named` as seen from `work_dir`; None if it is gone, or belongs to another work_dir."""
    name = os.path.basename(named)
    here = os.path.join(work_dir, name)
    if name in ('', '.', '..'):
        return None
    for whole in (here, f'{here}.old'):  # a folder that a process killed in `whole_folder` has left between two names
        if os.path.exists(whole):
            return whole
    # With CheckpointHook.out_dir the files lie elsewhere on purpose, in a folder of the work_dir's name; a work_dir
    # is known by its last_checkpoint.
    other = Path(named).parent
    apart = (os.path.exists(named) and other.name == Path(work_dir).resolve().name
             and not (other / 'last_checkpoint').exists())
    remote = '://' in named and not named.startswith(('http://', 'https://'))  # where no run has written
    return named if apart or remote else None


def _newest_numbered(path: str, named: str) -> str | None:
    """The checkpoint of the highest number in `path`, of the kind of `named` (iter or epoch) if there is one."""
    matches = [match for match in map(NUMBERED.fullmatch, os.listdir(path)) if match] if os.path.isdir(path) else []
    kind = named.partition('_')[0]
    newest = max(matches, key=lambda match: (match.group(1) == kind, int(match.group(2))), default=None)
    return None if newest is None else os.path.join(path, newest.group())
