"""`cdm evaluate`: images of several models from the same noise, scored and compared."""
from .entries import Entry, parse_entries
from .run import Evaluation, evaluate

__all__ = ['Entry', 'Evaluation', 'evaluate', 'parse_entries']
