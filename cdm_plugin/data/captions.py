"""The prompt of a sample: its place in a row, one of several captions, templates, prompts that are left out."""
import contextlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cdm_plugin.data.prompt_files import is_blank

LONGEST = 2**17  # characters of a prompt; tokenizers take minutes for what is no prompt (csv has the same limit)


def lookup(row: Mapping[str, Any], name: str) -> Any:
    """A field of a row; if none has that name, what its parts between dots lead to: 'meta.caption', 'captions.0'.

    Raises:
        KeyError: If there is none.
    """
    if name in row:
        return row[name]
    value: Any = row
    try:
        for part in name.split('.'):
            value = value[int(part) if isinstance(value, list) else part]
    except (KeyError, IndexError, TypeError, ValueError):
        raise KeyError(name) from None
    return value


def check_caption(text: Any, where: str, key: str, name: str) -> None:
    """Checks a caption, or each of several.

    Args:
        text: The text, or a list of texts.
        where (str): File and line, for the message.
        key (str): Argument that names the column.
        name (str): Its value.

    Raises:
        ValueError: If it is none, or one that no tokenizer takes. One line that says what to do.
    """
    if isinstance(text, list):
        if not text:
            raise ValueError(f'{where}: {name!r} is an empty list; give it a caption or delete the row')
        for i, one in enumerate(text):
            if isinstance(one, list):
                raise ValueError(f'{where}: {name}.{i} is a list, but a caption is a text')
            check_caption(one, where, key, f'{name}.{i}')
        return
    if not isinstance(text, str):
        raise ValueError(f'{where}: {name!r} is a {type(text).__name__}, but a prompt is a text; set `{key}` to the '
                         'column of the prompts')
    if is_blank(text):
        raise ValueError(f'{where}: the prompt is empty; fill it in or delete the row')
    if len(text) > LONGEST:
        raise ValueError(f'{where}: the prompt has {len(text)} characters, more than {LONGEST}; is a line break '
                         'missing?')
    if '\0' in text:
        raise ValueError(f'{where}: the prompt holds a NUL character; mend it or delete the row')
    if not is_encodable(text):
        raise ValueError(f'{where}: the prompt holds half of a surrogate pair (a cut emoji), which no tokenizer takes; '
                         'mend it or delete the row')


def is_encodable(text: str) -> bool:
    """Whether a text is one in UTF-8: half of a surrogate pair is not."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclass
class _Enumeration:
    """Which of a sample's prompts is taken instead of drawing one, and how many it was found to have."""
    number: int = 0
    count: int = 1


_enumeration: _Enumeration | None = None


class Captions:
    """Chooses the text of a sample: one of its captions, in one of the templates, or none. Draws come from Python's
    global generator, which MMEngine seeds in every worker, and a stream for every sample.

    Args:
        templates (Sequence[str]): Texts with `{}`, where the caption goes; empty for the caption as it is.
        dropout (float): Probability of the empty text.
    """

    def __init__(self, templates: Sequence[str], dropout: float) -> None:
        for template in templates:
            if template.count('{}') != 1:
                raise ValueError(f'`template` of PackInputs needs one {{}}, where the caption goes, but is '
                                 f'{template!r}')
        self.templates, self.dropout = tuple(templates) or ('{}',), dropout

    @property
    def changes(self) -> bool:
        """Whether a single caption does not stay as it is."""
        return self.templates != ('{}',) or self.dropout > 0

    def choose(self, captions: Sequence[str]) -> str:
        """One text of a sample's captions, of which there is one at least."""
        if _enumeration is not None:
            every = [_filled(template, caption) for caption in captions for template in self.templates]
            every += [''] if self.dropout else []
            _enumeration.count = max(_enumeration.count, len(every))
            return every[_enumeration.number % len(every)]
        if self.dropout and random.random() < self.dropout:
            return ''
        # One of one is not drawn: other transforms keep their draws.
        caption, template = (random.choice(of) if len(of) > 1 else of[0] for of in (captions, self.templates))
        return _filled(template, caption)


def _filled(template: str, caption: str) -> str:
    return template.replace('{}', caption)


def every_variant(read: Callable[[], Any]) -> Iterator[Any]:
    """A sample with each prompt that may be drawn for it, in a fixed order: captions, in each template, then the empty
    one.

    Args:
        read (Callable): Reads the sample, in this process.

    Yields:
        The sample, once a prompt.
    """
    enumeration = _Enumeration()
    while enumeration.number < enumeration.count:
        with _taking(enumeration):
            sample = read()
        yield sample
        enumeration.number += 1


@contextlib.contextmanager
def _taking(enumeration: _Enumeration) -> Iterator[None]:
    """Instead of drawing; not while others go on, between two samples."""
    global _enumeration
    before, _enumeration = _enumeration, enumeration
    try:
        yield
    finally:
        _enumeration = before
