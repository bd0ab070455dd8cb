from typing import Any


class Sample(dict):
    """A dict that says what is wrong when the samples of a batch differ in their fields.

    MMEngine's collate functions ask every sample for the fields of the first one, in a worker process, where a bare
    KeyError tells nothing.
    """

    def __missing__(self, name: Any) -> Any:
        raise KeyError(f'a sample has no {name!r}, only {sorted(map(str, self))}, while another one of its batch has '
                       'it: mix datasets of one kind only in train_dataloader.dataset')


class SampleError(ValueError):
    """What is wrong with one sample, in one line.

    Torch raises the error of a worker process again with the worker's whole traceback as its text, which ends with the
    error itself: that end is kept.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text.rpartition(f'{SampleError.__name__}: ')[2].strip())
