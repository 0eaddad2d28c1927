"""Files that take their name only when they are whole.

Whoever reads the path sees the old file or the new one, also after a crash: the bytes are on the
disk before the name is, and the name before the call returns.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moesaic import _core
from moesaic._errors import error_of
from moesaic._files import is_special, not_regular


def check_target(operation: str, path: Path, overwrite: bool) -> None:
    """Raises before any work what taking the name would raise after it."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise FileNotFoundError(2, "No such folder", str(path.parent)) from None
        return
    if is_special(mode):
        raise not_regular(path)
    if path.is_dir():
        raise IsADirectoryError(21, "Is a directory", str(path))
    if not overwrite:
        raise exists(operation, path)


def exists(operation: str, path: Path) -> _core.ConfigError:
    hint = "overwrite=True replaces it"
    return error_of(
        _core.ConfigError, operation, str(path), "a new file", "one that is there", hint
    )


@contextmanager
def replacing(operation: str, path: Path, overwrite: bool) -> Iterator[Path]:
    """The path of an empty file beside ``path``, which takes its name at the end.

    Where the block raises, the file is gone and ``path`` is as it was.
    """
    path = path.resolve()  # a link stays one
    check_target(operation, path, overwrite)
    handle, name = tempfile.mkstemp(prefix=f".{path.name[:100]}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with naming(path):
            take_name(operation, temporary, path, overwrite)
    except BaseException:
        with suppress(FileNotFoundError):
            temporary.unlink()
        raise


def take_name(operation: str, temporary: Path, path: Path, overwrite: bool) -> None:
    """Gives a whole file its name."""
    _give_usual_mode(temporary, path)
    sync(temporary)
    if overwrite:
        temporary.replace(path)
    else:
        # Unlike a rename, a link fails where somebody else has made the file meanwhile.
        try:
            path.hardlink_to(temporary)
        except FileExistsError:
            raise exists(operation, path) from None
        except OSError:  # a file system without links
            check_target(operation, path, overwrite)
            temporary.replace(path)
        else:
            temporary.unlink()
    sync(path.parent)


def sync(path: Path) -> None:
    """Brings a file, or the names of a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _give_usual_mode(temporary: Path, path: Path) -> None:
    """The mode of the file that is replaced, else that of any new file."""
    with suppress(FileNotFoundError):
        temporary.chmod(path.stat().st_mode & 0o777)
        return
    # The umask can only be read by setting it, which would hold for other threads meanwhile; a file
    # of the system's own making shows it.
    probe = temporary.with_suffix(".mode")
    os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        temporary.chmod(probe.stat().st_mode & 0o777)
    finally:
        probe.unlink()


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Failed system calls of the block that name no file are about ``path``."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None
