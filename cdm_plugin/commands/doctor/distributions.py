"""Whether two distributions have written their files of `mmengine` over each other."""
import base64
import hashlib
from importlib.metadata import Distribution, PackagePath
from pathlib import Path

from cdm_plugin.compat.packages import mmengine_distributions


def problem() -> str | None:
    """What is wrong if several distributions have written the same files, and what to do."""
    found = [_named(distribution) for distribution in mmengine_distributions()]
    if len(found) < 2:
        return None
    names = [distribution.metadata['Name'] for distribution in mmengine_distributions()]
    return (f'{" and ".join(found)} have written the same files of the import mmengine over each other '
            f'({_changes()} are not as installed): `pip uninstall -y {" ".join(names)}`, then install one of them, and '
            'this package with CDM_MMENGINE set to it')


def warning() -> str | None:
    """What is worth knowing of the files of the one distribution, or None."""
    changes = _changes()
    if len(mmengine_distributions()) != 1 or not changes:
        return None
    return (f'files of the import mmengine are not as installed, {changes}: patched here, or left by another '
            f'distribution of it; `pip install --force-reinstall --no-deps '
            f'{mmengine_distributions()[0].metadata["Name"]}=={mmengine_distributions()[0].version}` brings them back')


def _named(distribution: Distribution) -> str:
    return f'{distribution.metadata["Name"]} {distribution.version}'


def _changes() -> str:
    counts = {_named(d): sum(map(_is_changed, d.files or ())) for d in mmengine_distributions()}
    return ', '.join(f'{count} of {name}' for name, count in counts.items() if count)


def _is_changed(file: PackagePath) -> bool:
    """Whether a file of the package is missing, or has another checksum than when it was installed."""
    if file.parts[0] != 'mmengine' or file.hash is None or file.suffix == '.pyc':
        return False
    try:
        digest = hashlib.new(file.hash.mode, Path(file.locate()).read_bytes()).digest()
    except FileNotFoundError:
        return True
    return base64.urlsafe_b64encode(digest).rstrip(b'=').decode() != file.hash.value
