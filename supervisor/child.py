"""A forked process: what it must shed of the supervisor, and how it learns that the supervisor is gone.

Runs between the fork and the first line of the worker's own code; no message passes here.
"""

from __future__ import annotations

import ctypes
import faulthandler
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable

from supervisor.restart import EXIT_FAILURE, EXIT_OK
from supervisor.signals import all_blocked, reset_in_child

PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)  # loaded before the fork: dlopen takes locks


def fork(child_main: Callable[[], int], *, keep: Iterable[int] = ()) -> int:
    """Fork; the child sheds what is the supervisor's, runs ``child_main`` and exits with what it returns.

    Args:
        child_main: all the child does; an exception of it is printed and ends the child with exit code 1.
        keep: descriptors, besides the three standard ones, that the child keeps.

    Returns:
        The child's process id.

    Raises:
        OSError: no process can be made.
    """
    supervisor_pid = os.getpid()
    kept = frozenset(keep)
    flush_output()  # or the child writes what is buffered a second time
    with all_blocked():
        pid = os.fork()
        if pid == 0:
            _run(child_main, kept, supervisor_pid)
    return pid


def _run(child_main: Callable[[], int], keep: frozenset[int], supervisor_pid: int) -> None:
    """The child's whole life. Never returns: the stack above belongs to the supervisor.

    That stack also keeps the supervisor's objects alive, whose finalizers would close descriptors by number.
    """
    code = EXIT_FAILURE
    try:
        reset_in_child()
        close_descriptors(keep)
        if die_with_parent(supervisor_pid):
            faulthandler.enable()
            code = child_main()
        else:
            code = EXIT_OK
    except SystemExit as request:
        code = request.code if isinstance(request.code, int) else EXIT_FAILURE
    except BaseException:
        traceback.print_exc()
    finally:
        logging.shutdown()
        flush_output()
        os._exit(code)


def flush_output() -> None:
    """Write out what is buffered, as far as there is somewhere to write."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            pass  # nobody reads it any more


def open_standard_streams() -> None:
    """Give the numbers 0, 1 and 2 to nothing, if they are closed: no socket of ours may get one of them."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)
    # Python sets them to None when they were closed at its start; much that logs does not expect that.
    sys.stdout = sys.stdout or open(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = sys.stderr or open(2, "w", encoding="utf-8", closefd=False)


def die_with_parent(parent_pid: int) -> bool:
    """Ask the kernel for SIGTERM when the parent dies; False if it is dead already."""
    _libc.prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    return os.getppid() == parent_pid


def close_descriptors(keep: frozenset[int]) -> None:
    """Close every descriptor but the three standard ones and ``keep``."""
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        if fd > 2 and fd not in keep:
            try:
                os.close(fd)
            except OSError:
                pass  # it was the one of the listing itself


def thread_names() -> list[str]:
    """The names of all threads of this process, those of C libraries too; the main thread is the first."""
    known = {thread.native_id: thread.name for thread in threading.enumerate()}
    tasks = sorted(map(int, os.listdir("/proc/self/task")))
    return [known.get(task) or _comm(task) for task in tasks]


def _comm(task: int) -> str:
    try:
        with open(f"/proc/self/task/{task}/comm", encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except FileNotFoundError:  # it ended meanwhile
        return "an ended thread"
