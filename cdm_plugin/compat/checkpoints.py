"""Checkpoints of stock MMEngine: read without unpickling objects, written straight to their file."""
import logging
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from typing import Any

import mmengine.runner.checkpoint as checkpoint_module
import torch
from mmengine.fileio import LocalBackend, get_file_backend
from mmengine.logging import print_log
from mmengine.runner import CheckpointLoader

from cdm_plugin.files import whole_file

TRUST = 'CDM_TRUST_CHECKPOINTS'

_stock_save_checkpoint = checkpoint_module.save_checkpoint
_stock_load_checkpoint = checkpoint_module._load_checkpoint
# Checkpoints that are no file of torch's: how one is known, its reader, and torch's files in it.
_formats: list[tuple[Callable[[str], bool], Callable[[str], dict[str, Any]], Callable[[str], list[str]]]] = []
# Files whose checksums agreed, with their size and time, so that nobody reads them for that again.
_sound: set[tuple[str, int, int]] = set()


class CheckpointError(RuntimeError, ValueError):
    """A checkpoint that cannot be read: RuntimeError as torch raises, and a mistake of the user like other values."""


def register_local_loader() -> None:
    """Makes `load_from_local` the reader of MMEngine's local checkpoints."""
    registered = CheckpointLoader._schemes.get('')
    # A loader that the host registered itself was meant to be used.
    if registered is None or registered.__module__.startswith('mmengine.'):
        CheckpointLoader.register_scheme(prefixes='', loader=load_from_local, force=True)


def register_format(matches: Callable[[str], bool], read: Callable[[str], dict[str, Any]],
                    files: Callable[[str], list[str]] = lambda path: []) -> None:
    """Lets `load_from_local` open checkpoints that are folders, or files of another kind than torch's.

    Args:
        matches (Callable): Whether what has this path is such a checkpoint.
        read (Callable): Puts it together as one of a run in one process, or as bare weights by name.
        files (Callable): The files that `torch.save` has written in it. It raises an error if one is missing. Default:
            none.
    """
    _formats.append((matches, read, files))


def damage(path: str) -> str | None:
    """What is wrong with a checkpoint on this machine, compared with the checksums that `torch.save` writes.

    `torch.load` does not look at them, and takes a weight with a flipped bit. The file is read through once, in pieces,
    and again only after it has changed.

    Args:
        path (str): A file, or a folder of a registered format.

    Returns:
        str or None: None if it is sound, or has no checksums (files before torch 1.6, or written with
        `torch.serialization.set_crc32_options(False)`).
    """
    for matches, _, files in _formats:
        if matches(path):
            try:
                return next((f'{os.path.basename(file)}: {problem}' for file in files(path)
                             if (problem := damage(file)) is not None), None)
            except (OSError, ValueError) as error:
                return str(error)
    try:
        known = (os.path.abspath(path), os.path.getsize(path), os.stat(path).st_mtime_ns)
        problem = None if known in _sound else _wrong_record(path)
    except OSError as error:
        return str(error)
    if problem is None:
        _sound.add(known)
    return problem


def _wrong_record(path: str) -> str | None:
    with open(path, 'rb') as file:
        head = file.read(2)
    if head != b'PK':
        # The format before torch 1.6 is a row of pickles, and every pickle begins with 0x80.
        return None if head[:1] == b'\x80' else 'it is no checkpoint'
    try:
        with zipfile.ZipFile(path) as records:
            checked = any(record.CRC for record in records.infolist())
            bad = records.testzip() if checked else None
    except Exception as error:  # whatever a damaged directory of the records leads to
        return str(error)
    if bad is not None:
        return f'{bad.partition("/")[2]} differs from its checksum'
    try:
        torch.load(path, map_location='cpu', weights_only=True, mmap=True)  # reads the directory with other eyes
    except Exception as error:
        return str(error).partition('.')[0] if _cannot_be_read(error) else None
    return None


def load_from_local(filename: str, map_location: Any = None, mapped: bool = False) -> Any:
    """Loads a checkpoint without unpickling objects, because an object can run code when it is unpickled.

    Args:
        filename (str): Path of the file, or of a folder of a registered format; `~` is expanded.
        map_location: As in :func:`torch.load`. Default None.
        mapped (bool): Whether the tensors of a file stay on the disk until they are used. Default False.

    Returns:
        Any: What the file holds, usually a dict.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If the file is damaged, or holds objects and CDM_TRUST_CHECKPOINTS=1 is not set.
    """
    path = os.path.expanduser(filename)
    for matches, read, _ in _formats:
        if matches(path):
            return read(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f'There is no checkpoint {path}: check the path given on the command line, or '
                                'load_from of the config')
    problem = damage(path)
    if problem is not None:
        raise CheckpointError(_damaged(path, problem))
    how = dict(map_location=map_location, mmap=mapped and zipfile.is_zipfile(path))  # files before torch 1.6 are no zip
    try:
        return torch.load(path, weights_only=True, **how)
    except Exception as error:
        if _cannot_be_read(error):
            raise CheckpointError(_damaged(path, str(error).partition('.')[0])) from None
        if not isinstance(error, pickle.UnpicklingError):
            raise
        if os.environ.get(TRUST) != '1':
            raise CheckpointError(
                f'Checkpoint {path} holds pickled objects ({_unsafe_global(error)}), which can run code when loaded: '
                f'if you trust where it comes from, set the environment variable {TRUST}=1 and start again (a run with '
                'CDMHook writes none)') from None
    print_log(f'Unpickling the objects of {path}, as {TRUST}=1 says to', logger='current', level=logging.WARNING)
    return torch.load(path, weights_only=False, **how)


def load_without_program(filename: str, map_location: Any = None, logger: Any = None) -> Any:
    """MMEngine's `_load_checkpoint`, which its runners call, with `without_program`."""
    return without_program(_stock_load_checkpoint(filename, map_location, logger))


def without_program(checkpoint: Any) -> Any:
    """A checkpoint without `meta['config']`. That is a config's text in old ones, which MMEngine's resume would run, to
    compare the number of GPUs."""
    meta = checkpoint.get('meta') if isinstance(checkpoint, dict) else None
    if isinstance(meta, dict):
        meta.pop('config', None)
    return checkpoint


def load_mapped(filename: str) -> Any:
    """Loads a checkpoint as MMEngine's CheckpointLoader does on the CPU, but what is not used of a local file takes no
    memory. Where the file is overwritten in place (not replaced), the tensors change with it.

    Args:
        filename (str): Path or URL.
    """
    if CheckpointLoader._get_checkpoint_loader(filename) is load_from_local:
        return load_from_local(filename, 'cpu', mapped=True)
    return CheckpointLoader.load_checkpoint(filename, map_location='cpu', logger='silent')


def save_checkpoint(checkpoint: dict[str, Any], filename: str, file_client_args: dict[str, Any] | None = None,
                    backend_args: dict[str, Any] | None = None) -> None:
    """Writes a checkpoint whole or not at all. A local file is written directly: MMEngine builds it in memory first,
    twice. Arguments as in :func:`mmengine.runner.save_checkpoint`.
    """
    if (file_client_args is None and not filename.startswith('pavi://') and LocalBackend.put is put_whole
            and type(get_file_backend(filename, backend_args=backend_args)) is LocalBackend):
        # An open file, because of a full disk torch says no more than that its own writer has failed.
        with whole_file(filename) as part, open(part, 'wb') as file:
            torch.save(checkpoint, file)
    else:
        _stock_save_checkpoint(checkpoint, filename, file_client_args, backend_args)


def put_whole(self: LocalBackend, obj: bytes, filepath: Any) -> None:
    """Writes a file whole or not at all: a run killed while it saves leaves no checkpoint cut short.

    Args:
        obj (bytes): Data to be written.
        filepath (str or Path): Where to; its folder is made if need be.
    """
    with whole_file(filepath) as part:
        part.write_bytes(obj)


def _damaged(path: str, problem: str) -> str:
    return (f'Checkpoint {path} is damaged or was cut short: copy it again, or delete it and resume from an earlier '
            f'one ({problem})')


def _cannot_be_read(error: Exception) -> bool:
    """Of a file that has no checksums, or of whose records one is missing."""
    return (isinstance(error, (EOFError, IndexError)) or 'unexpected EOF' in str(error)
            or 'PytorchStreamReader' in str(error))


def _unsafe_global(error: Exception) -> str:
    match = re.search(r'GLOBAL (\S+)', str(error))
    return match.group(1) if match else 'of a kind that torch does not name'


