"""``python -m supervisor`` and the console script ``flockwire``: makes sure that the packages are ours, then the CLI.

The names ``supervisor``, ``workers`` and ``ipc`` are common. Where the working directory holds packages of the user's
that are called so, ours are imported all the same, and the directory is put back on the path for ``--app``. Where a
foreign package stands in the place of one of ours, the start ends with words. No message passes here.
"""

from __future__ import annotations

import importlib
import os
import sys

OURS = ("supervisor", "workers", "ipc")
EXIT_USAGE = 2


def main() -> None:
    """Run the command line and exit."""
    foreign = import_ours()
    if foreign:
        sys.stderr.write(f"error: {foreign}\n")
        sys.exit(EXIT_USAGE)
    from supervisor.cli import run

    sys.exit(run(sys.argv[1:]))


def import_ours() -> str | None:
    """Import our packages past the working directory, and put that in front of the path for the application.

    Returns:
        The words of what is wrong; None when all is well.
    """
    try:
        here = os.getcwd()
    except FileNotFoundError:
        return "the working directory does not exist any more; change to another one"
    home = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    if os.path.realpath(home) != os.path.realpath(here):
        sys.path[:] = [entry for entry in sys.path if entry not in ("", ".", here)]
    try:
        problems = [_problem(name) for name in OURS]
    finally:
        if sys.path[:1] != [here]:
            sys.path.insert(0, here)
    return next(filter(None, problems), None)


def _problem(name: str) -> str | None:
    try:
        package = importlib.import_module(name)
    except Exception as error:
        return f"the package {name!r} can not be imported: {type(error).__name__}: {error}"
    if getattr(package, "__flockwire__", False):
        return None
    origin = getattr(package, "__file__", None) or next(
        iter(getattr(package, "__path__", [])), "an unknown place"
    )
    return (
        f"the package {name!r} from {origin} is not flockwire's but another one of the same name;"
        " install flockwire in a virtual environment of its own, or take the other off the path"
    )


if __name__ == "__main__":
    main()
