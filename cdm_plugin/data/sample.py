from typing import Any


class Sample(dict):
    """A dict that says what is wrong when the samples of a batch differ in their fields.

    MMEngine's collate functions ask every sample for the fields of the first one, in a worker process, where a bare
    KeyError tells nothing.
    """

    def __missing__(self, name: Any) -> Any:
        raise KeyError(f'a sample has no {name!r}, only {sorted(map(str, self))}, while another one of its batch has '
                       'it: mix datasets of one kind only in train_dataloader.dataset')
