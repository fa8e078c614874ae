"""Content hash of a checkpoint's files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from avss_dist.core.errors import ModelError
from avss_dist.system.files import cache_folder, staged_file


def content_hash(folder: Path, files: Iterable[Path]) -> str:
    """Return the SHA-256 over the bytes of files and their paths in a folder; hashes of large files are cached.

    Raises:
        ModelError: a file cannot be read.
    """
    digest = hashlib.sha256()
    for file in sorted(files):
        try:
            digest.update(f"{file.relative_to(folder).as_posix()}\0{_file_hash(file.resolve())}\n".encode())
        except OSError as error:
            raise ModelError(f"{file} cannot be read: {error.strerror}.", "Check its permissions.") from error
    return digest.hexdigest()


def _file_hash(file: Path) -> str:
    stat = file.stat()
    state = stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino  # ctime: who writes cannot set it back
    key = hashlib.sha256(f"{file}|{state}".encode()).hexdigest()
    cache = cache_folder("sha256", key)
    if stat.st_size > 1 << 20 and cache.is_file():
        return cache.read_text(encoding="ascii")
    with file.open("rb") as stream:
        value = hashlib.file_digest(stream, "sha256").hexdigest()
    if stat.st_size > 1 << 20:
        _remember(cache, value)
    return value


def _remember(cache: Path, value: str) -> None:
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with staged_file(cache) as staged:
            staged.write_text(value, encoding="ascii")
    except OSError:
        return  # only a convenience: without it the file is hashed again
