"""A private directory: where it is by default, and the checks before one is used.

Stands under ``runtime.py``. The directory is ours, 0700 and no symbolic link, and so is the directory of this user
around it, whose name can be guessed; missing ones are made so, whatever the umask.
"""

from __future__ import annotations

import os
import stat
import tempfile


class RuntimeDirError(Exception):
    """The runtime directory cannot be used. The text says which, why and what to do."""


def default_runtime_dir(port: int | None = None) -> str:
    """Where the hub of a port meets by default; without a port, where a bare ``ipc://`` does.

    ``/dev/shm`` where it can be used, else ``XDG_RUNTIME_DIR``, else the directory for temporary files.
    """
    name = user_directory()
    leaf = "default" if port is None else str(port)
    # A directory in memory, private (0700) and checked to be ours before it is used.
    candidates = ("/dev/shm", os.environ.get("XDG_RUNTIME_DIR", ""), tempfile.gettempdir())  # noqa: S108
    for base in candidates:
        if base and os.path.isdir(base) and os.access(base, os.W_OK | os.X_OK):
            return os.path.join(base, name, leaf)
    return os.path.join(candidates[-1], name, leaf)


def user_directory() -> str:
    """The name of this user's directory of runtime directories."""
    return f"flockwire-{os.geteuid()}"


def open_directory(path: str, create: bool) -> int:
    """A descriptor of the directory, after checking it.

    Raises:
        FileNotFoundError: it is missing and ``create`` is false.
        RuntimeDirError: it is not ours alone, or cannot be opened or made.
    """
    try:
        if create:
            _make_directories(path)
        parent = os.path.dirname(path)
        if os.path.basename(parent) == user_directory():
            # Its name can be guessed and /dev/shm is everybody's: another user may have been there first.
            os.close(_open_checked(parent))
        return _open_checked(path)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise RuntimeDirError(f"{error.filename or path}: {error.strerror}") from error


def _make_directories(path: str) -> None:
    if os.path.lexists(path):
        return
    parent = os.path.dirname(path)
    if parent != path:
        _make_directories(parent)
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        return
    # A umask may have taken bits away from the mode.
    os.chmod(path, 0o700)


def _open_checked(path: str) -> int:
    if os.path.islink(path):
        raise RuntimeDirError(f"{path} is a symbolic link; name the directory itself")
    if not os.path.isdir(path) and os.path.lexists(path):
        raise RuntimeDirError(f"{path} is not a directory")
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    status = os.fstat(fd)
    problem = None
    if status.st_uid != os.geteuid():
        problem = f"belongs to user {status.st_uid}, not to this one ({os.geteuid()}); name another directory"
    elif stat.S_IMODE(status.st_mode) & 0o077:
        problem = (
            f"has mode {stat.S_IMODE(status.st_mode):04o}, open to other users; chmod 700 it or name another"
        )
    elif stat.S_IMODE(status.st_mode) & 0o700 != 0o700:
        problem = f"has mode {stat.S_IMODE(status.st_mode):04o}; chmod 700 it"
    if problem is None:
        return fd
    os.close(fd)
    raise RuntimeDirError(f"{path} {problem}")


def exists(directory: int, name: str) -> bool:
    """Whether something of this name is in an open directory; links are not followed."""
    return _mode(directory, name) != 0


def is_directory(directory: int, name: str) -> bool:
    """Whether it is a directory itself."""
    return stat.S_ISDIR(_mode(directory, name))


def _mode(directory: int, name: str) -> int:
    try:
        return os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return 0
