"""Files that come with the package, reached from configs as `asset:NAME`."""
import os
from pathlib import Path

SCHEME = 'asset:'
ROOT = Path(__file__).parent


def resolve(path: 'str | os.PathLike[str]') -> str:
    """Turns a path from a config into one that can be opened.

    Args:
        path (str): `asset:NAME` (`asset:digits/images.npz`, or a folder, `asset:digits`) for something that is
            installed with the package; anything else is a path of the user's own.

    Returns:
        str: The absolute path of an asset; any other path as given, with a leading `~` expanded.

    Raises:
        FileNotFoundError: If there is no such asset. The message lists those that there are.
    """
    path = os.fspath(path)
    if not path.startswith(SCHEME):
        return os.path.expanduser(path)
    # Lexical, as a store-and-link installer may keep the files themselves elsewhere.
    target = Path(os.path.normpath(ROOT / path[len(SCHEME):]))
    if ROOT not in target.parents or not target.exists():
        there_are = ', '.join(SCHEME + name for name in _names()) or 'none'
        raise FileNotFoundError(f'no asset {path!r} in the installed cdm_plugin; there are: {there_are}')
    return str(target)


def _names() -> list[str]:
    files = (file for file in ROOT.rglob('*') if file.is_file() and file.suffix not in ('.py', '.pyc'))
    return sorted(file.relative_to(ROOT).as_posix() for file in files)
