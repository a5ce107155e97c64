"""Compile the load generator and the limit server; without a compiler say so by name."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from bench.places import BIN, HERE

PROGRAMS: dict[str, tuple[str, ...]] = {
    "load": ("load.c", "load_conn.c"),
    "limit": ("peers/limit.c",),
}
"""Program name to its C files; the headers beside them count for freshness too."""
FLAGS = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-pthread")


class NoCompiler(RuntimeError):
    """There is no C compiler, and what is asked for is not built yet."""


def compiler() -> str | None:
    """The C compiler to use: ``cc``, ``gcc`` or ``clang``, whichever is found first."""
    return next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)


def build(name: str) -> Path:
    """The program ``name``, compiled when it is missing or older than its sources.

    Raises:
        NoCompiler: it has to be compiled and there is no compiler.
    """
    sources = [HERE / source for source in PROGRAMS[name]]
    target = BIN / name
    newest = max(path.stat().st_mtime for path in (*sources, *HERE.glob("*.h")))
    if target.exists() and target.stat().st_mtime >= newest:
        return target
    cc = compiler()
    if cc is None:
        raise NoCompiler(
            f"no C compiler (cc, gcc, clang) to build bench/bin/{name}; install one, on Debian gcc"
        )
    BIN.mkdir(exist_ok=True)
    # Built beside and moved over: a run that is under way keeps the program it started.
    fresh = target.with_suffix(".new")
    command = [cc, *FLAGS, "-o", str(fresh), *map(str, sources)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise NoCompiler(f"{' '.join(command)} failed:\n{done.stderr}")
    fresh.replace(target)
    return target


if __name__ == "__main__":
    for program in PROGRAMS:
        print(build(program))
