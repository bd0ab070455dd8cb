"""Rows of the text files that hold prompts: txt, jsonl and csv, in UTF-8 with or without a byte-order mark."""
import codecs
import csv
import io
import json
import unicodedata
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

from mmengine import fileio

Rows = Iterator[tuple[int, dict[str, Any] | ValueError]]
DEEPEST = 100  # levels of a JSON value; Python's own limit, some hundred levels later, ends in no message
# How files begin that stand where a prompt file should be.
STRANGERS = {b'version https://git-lfs': 'a pointer of Git LFS, not the file itself; fetch that with `git lfs pull`',
             b'<!doctype html': 'a web page; download the file again', b'<html': 'a web page; download the file again'}


def is_blank(text: str) -> bool:
    """Whether a text shows nothing: only spaces and characters without width."""
    return all(c.isspace() or unicodedata.category(c) == 'Cf' for c in text.strip())


def read_rows(path: str, column: str) -> Rows:
    """Reads a file of prompts.

    Args:
        path (str): A `.txt` (one prompt a line), `.jsonl` (one object a line) or `.csv` (with a header) file, local
            or of any storage backend of MMEngine. Blank lines are skipped.
        column (str): What to call the only column of a txt file.

    Yields:
        tuple[int, dict]: The line number, from 1, and the row by column, or a ValueError that says why it is none.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file has another suffix, cannot be read, is not UTF-8, is a pointer or a web page instead, or
            no row can be told from the next (csv). The message names the line.
    """
    suffix = PurePath(path).suffix.lower()
    if suffix == '.txt':
        return _txt_rows(_read_text(path), column)
    if suffix == '.jsonl':
        return _jsonl_rows(path, _read_text(path))
    if suffix == '.csv':
        return _csv_rows(path, _read_text(path))
    raise ValueError(f'`ann_file` {path} has an unknown suffix {suffix!r}: give a .txt file with one prompt a line, a '
                     '.jsonl file or a .csv file')


def _read_text(path: str) -> str:
    try:
        content = fileio.get(path)
    except FileNotFoundError:
        raise FileNotFoundError(f'`ann_file` {path} does not exist: check it, and `data_root`') from None
    except OSError as error:
        raise ValueError(f'`ann_file` {path} cannot be read ({error.strerror or error})') from error
    for start, what in STRANGERS.items():
        if content[:100].lstrip().lower().startswith(start):
            raise ValueError(f'`ann_file` {path}, line 1: the file is {what}')
    if _is_utf16(content):
        raise ValueError(f'`ann_file` {path}, line 1: the file is UTF-16; save it as UTF-8')
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b'\n', 0, error.start) + 1
        raise ValueError(f'`ann_file` {path}, line {line}: byte 0x{content[error.start]:02x} is not UTF-8; save the '
                         'file as UTF-8') from None
    if '\0' in text:
        line = text.count('\n', 0, text.index('\0')) + 1
        raise ValueError(f'`ann_file` {path}, line {line}: a NUL character; the file is damaged or no text')
    return text.replace('\ufeff', '')  # a byte-order mark, one a file where files were joined; it has no width


def _is_utf16(content: bytes) -> bool:
    """By its mark or, without one, by the zeros at every other byte of Latin letters."""
    halves = [content[start:4096:2] for start in (0, 1)]
    return content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or any(
        2 * half.count(0) > len(half) for half in halves)


def _lines(text: str) -> Iterator[tuple[int, str]]:
    # Not str.splitlines, which would also cut a prompt at a form feed or at Unicode's line separators.
    for number, line in enumerate(io.StringIO(text, newline=None), 1):
        if not is_blank(line):
            yield number, line.strip()


def _txt_rows(text: str, column: str) -> Rows:
    for number, line in _lines(text):
        yield number, {column: line}


def _jsonl_rows(path: str, text: str) -> Rows:
    for number, line in _lines(text):
        try:
            yield number, _json_row(line, f'`ann_file` {path}, line {number}')
        except ValueError as error:
            yield number, error


def _json_row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
        if _is_deep(row):
            raise RecursionError
    except RecursionError:
        raise ValueError(f'{where}: JSON of more than {DEEPEST} levels') from None
    except json.JSONDecodeError as error:
        raise ValueError(f'{where}: not JSON ({error.msg} at column {error.colno}); each line of a .jsonl file is '
                         'one JSON object') from None
    except ValueError as error:  # a number of more digits than Python reads
        raise ValueError(f'{where}: not readable ({error})') from None
    if not isinstance(row, dict):
        raise ValueError(f'{where}: a {type(row).__name__}; each line of a .jsonl file is one JSON object such as '
                         '{"prompt": "a cat"}')
    return row


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(DEEPEST):
        level = [inner for part in level if isinstance(part, (dict, list))
                 for inner in (part.values() if isinstance(part, dict) else part)]
    return bool(level)


def _csv_rows(path: str, text: str) -> Rows:
    reader = csv.DictReader(io.StringIO(text, newline=''), strict=True)
    try:
        places: dict[str, int] = {}
        for place, name in enumerate(reader.fieldnames or (), 1):
            if places.setdefault(name.strip(), place) != place:
                raise ValueError(f'`ann_file` {path}, line {reader.line_num}: the columns {places[name.strip()]} and '
                                 f'{place} are both called {name.strip()!r}; give each its own name')
        for row in reader:
            # DictReader's marks of a row that is longer or shorter than the header.
            if None in row or None in row.values():
                yield reader.line_num, ValueError(
                    f'`ann_file` {path}, line {reader.line_num}: not as many cells as the header; put a prompt that '
                    'holds a comma in double quotes')
                continue
            yield reader.line_num, row
    except csv.Error as error:
        # DictReader counts the rows that it has read whole.
        raise ValueError(f'`ann_file` {path}, row from line {reader.line_num + 1}: malformed csv ({error})') from None
