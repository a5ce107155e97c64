"""Publishing from a program that serves nobody: a cron job, a Celery task, a script.

python -m supervisor tail "status/#"       see it arrive, in another terminal
python publish.py RUNTIME_DIR              the directory that the running hub printed at its start
"""

from __future__ import annotations

import sys
import time

from ipc import HubNotFound, Publisher


def main() -> int:
    """One message; it has reached every interested worker when `publish` returns."""
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        # channel="..." names the manager of an application; without, it is the built-in hub's.
        with Publisher(sys.argv[1]) as publisher:
            publisher.publish("status/backup", {"done": True, "at": time.time()})
    except HubNotFound as error:
        print(error, file=sys.stderr)
        return 1
    print("published")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
