"""Mistakes of the user: which errors they are, and what was probably meant."""
import difflib
from collections.abc import Iterable
from pathlib import Path

# Mistakes in a config, in the data or on the command line: one line is worth more than a traceback.
USER_ERRORS = (ValueError, TypeError, KeyError, OSError, ImportError, RecursionError)
# Those whose message does not say where they come from.
BARE = (KeyError, TypeError, IndexError, AttributeError, AssertionError, RecursionError)


def did_you_mean(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """The end of a message about an unknown word: '; did you mean ...?', or nothing if no known word is like it.

    Args:
        word (str): What was given.
        known (Iterable[str]): What there is.
        cutoff (float): How alike they must be, in [0, 1], as in `difflib`. Default 0.6.
    """
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f'; did you mean {close[0]!r}?' if close else ''


def describe(error: BaseException) -> str:
    """An error in one line. What Python itself says of a mistake in the data, such as a KeyError's one word, is of no
    use without its kind and place, so these are added."""
    text = ' '.join(str(error).split())
    if not isinstance(error, BARE) and text:
        return text
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    where = '' if place is None else f' in {Path(place.tb_frame.f_code.co_filename).name}, line {place.tb_lineno}'
    return f'{text} ({type(error).__name__}{where})'.strip()


class NotFinite(SystemExit):
    """Ends a run whose weights, or whose steps for too long, are not finite, with an exit status of its own.

    As a SystemExit it has that status under any script that trains with MMEngine's runner.

    Args:
        text (str): What was found, in one line.
    """
    STATUS = 3

    def __init__(self, text: str) -> None:
        super().__init__(self.STATUS)
        self.text = text

    def __str__(self) -> str:
        return self.text


class Stopped(SystemExit):
    """Ends a run that was asked to stop, when it has saved: exit status 128 + the signal's number, as a shell has it.

    Args:
        number (int): The signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
