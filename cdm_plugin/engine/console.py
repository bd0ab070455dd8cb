"""What a training shows on the console."""
import contextlib
import logging
from collections.abc import Iterator

import diffusers
import transformers
from mmengine.logging import MMLogger

# MMEngine's words about itself, in every run.
NOISE = ('will be deprecated in future', 'all SyncBatchNorm (SyncBN) layers')


@contextlib.contextmanager
def quiet_console() -> Iterator[None]:
    """Inside, the console shows what MMEngine's logger says in one line, and all warnings. The tables (the machine, the
    config, the order of hooks), some 250 lines before the first iteration, stand in the log file alone. Weights that
    are read from the disk have no bars; downloads keep theirs."""
    def to_handlers(self: MMLogger, record: logging.LogRecord) -> None:
        text = record.getMessage()
        quiet = record.levelno < logging.WARNING and '\n' in text or any(words in text for words in NOISE)
        for handler in self.handlers:
            if record.levelno >= handler.level and (not quiet or isinstance(handler, logging.FileHandler)):
                handler.handle(record)

    stock, MMLogger.callHandlers = MMLogger.callHandlers, to_handlers
    bars = [library.utils.logging for library in (diffusers, transformers)
            if library.utils.logging.is_progress_bar_enabled()]
    for library in bars:
        library.disable_progress_bar()
    try:
        yield
    finally:
        MMLogger.callHandlers = stock
        for library in bars:
            library.enable_progress_bar()
