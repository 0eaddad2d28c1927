"""Files and text that come from outside: regular files only, and bytes that need not be UTF-8.

A pipe would hang whoever opens it, and a device has no end.
"""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

#: The longest header that the reference implementation of safetensors reads, and more than any
#: configuration or index has.
MAX_JSON = 100 << 20


def printable(text: str) -> str:
    """Text of a file or a path with the bytes escaped that are not UTF-8."""
    try:
        stored = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # half a pair of UTF-16, which JSON can spell
        stored = text.encode("utf-8", "backslashreplace")
    return stored.decode("utf-8", "backslashreplace")


def shown(value: object) -> str:
    """A value for a message. Python refuses to write out integers of thousands of digits."""
    try:
        return repr(value)[:80]
    except (ValueError, RecursionError):
        return f"a {type(value).__name__} too long to show"


def is_special(mode: int) -> bool:
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def not_regular(path: Path) -> OSError:
    return OSError(errno.EINVAL, "Not a regular file", str(path))


def snapshot_of(folder: Path) -> Path:
    """The files of a model in a folder of the hub's cache (``models--org--name``).

    That is the revision that ``refs/main`` names, else the only one; other folders come back as
    they are. Raises OSError where several revisions are there and none is the main one.
    """
    snapshots = folder / "snapshots"
    if not snapshots.is_dir():
        return folder
    try:
        main = snapshots / read_text_bytes(folder / "refs" / "main").decode().strip()
        if main.is_dir() and main.parent == snapshots:
            return main
    except (OSError, UnicodeDecodeError):
        pass
    found = [entry for entry in snapshots.iterdir() if entry.is_dir()]
    if len(found) != 1:
        raise OSError(errno.ENOENT, f"{len(found)} snapshots, expected one to open", str(folder))
    return found[0]


def descriptor_of(path: Path) -> int:
    """Raises OSError for anything that is no regular file, without waiting for it."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags | getattr(os, "O_CLOEXEC", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise not_regular(path)
    return descriptor


def open_regular(path: Path) -> BinaryIO:
    """A file for reading. Raises as ``descriptor_of``."""
    return os.fdopen(descriptor_of(path), "rb", buffering=0)


def size_of(file: BinaryIO) -> int:
    return os.fstat(file.fileno()).st_size


def read_into(file: BinaryIO, memory: memoryview) -> int:
    """Fills ``memory``; returns the bytes that are missing where the file ends before."""
    while memory:
        count = file.readinto(memory)  # type: ignore[attr-defined]
        if not count:
            break
        memory = memory[count:]
    return len(memory)


def read_at(file: BinaryIO, memory: memoryview, offset: int) -> int:
    """As ``read_into``, at an offset: threads share a file without moving its position."""
    while memory:
        count = os.preadv(file.fileno(), [memory], offset)
        if not count:
            break
        memory, offset = memory[count:], offset + count
    return len(memory)


def read_text_bytes(path: Path) -> bytes:
    """The bytes of a JSON file. Raises OSError also for one larger than any of its kind."""
    with open_regular(path) as file:
        size = size_of(file)
        if size > MAX_JSON:
            raise OSError(errno.EFBIG, f"More than {MAX_JSON} bytes of JSON", str(path))
        data = bytearray(size)
        missing = read_into(file, memoryview(data))
    return bytes(data[: size - missing])
