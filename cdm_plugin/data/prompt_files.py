"""Rows of the text files that hold prompts: txt, jsonl and csv, in UTF-8 with or without a byte-order mark."""
import csv
import io
import json
from pathlib import PurePath
from typing import Any, Dict, Iterator, Tuple

from mmengine import fileio

Rows = Iterator[Tuple[int, Dict[str, Any]]]


def read_rows(path: str, column: str) -> Rows:
    """Reads a file of prompts.

    Args:
        path (str): A `.txt` (one prompt a line), `.jsonl` (one object a line) or `.csv` (with a header) file, local
            or of any storage backend of MMEngine. Blank lines are skipped.
        column (str): What to call the only column of a txt file.

    Yields:
        tuple[int, dict]: The line number, from 1, and the row by column.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file has another suffix, cannot be read, is not UTF-8, or is malformed. The message names
            the line.
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
    try:
        return content.decode('utf-8-sig')
    except UnicodeDecodeError as error:
        line = error.object.count(b'\n', 0, error.start) + 1
        raise ValueError(f'`ann_file` {path}, line {line}: byte 0x{error.object[error.start]:02x} is not UTF-8; save '
                         'the file as UTF-8') from None


def _lines(text: str) -> Iterator[Tuple[int, str]]:
    # Not str.splitlines, which would also cut a prompt at a form feed or at Unicode's line separators.
    for number, line in enumerate(io.StringIO(text, newline=None), 1):
        if line.strip():
            yield number, line.strip()


def _txt_rows(text: str, column: str) -> Rows:
    for number, line in _lines(text):
        yield number, {column: line}


def _jsonl_rows(path: str, text: str) -> Rows:
    for number, line in _lines(text):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f'`ann_file` {path}, line {number}: not JSON ({error.msg} at column {error.colno}); each '
                             'line of a .jsonl file is one JSON object') from None
        if not isinstance(row, dict):
            raise ValueError(f'`ann_file` {path}, line {number}: a {type(row).__name__}; each line of a .jsonl file is '
                             'one JSON object such as {"prompt": "a cat"}')
        yield number, row


def _csv_rows(path: str, text: str) -> Rows:
    reader = csv.DictReader(io.StringIO(text, newline=''), strict=True)
    try:
        for row in reader:
            # DictReader's marks of a row that is longer or shorter than the header.
            if None in row or None in row.values():
                raise ValueError(f'`ann_file` {path}, line {reader.line_num}: not as many cells as the header; put a '
                                 'prompt that holds a comma in double quotes')
            yield reader.line_num, row
    except csv.Error as error:
        # DictReader counts the rows that it has read whole.
        raise ValueError(f'`ann_file` {path}, row from line {reader.line_num + 1}: malformed csv ({error})') from None
