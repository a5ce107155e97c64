"""Publishing from a program that serves nobody: a cron job, a Celery task, a script.

python publish.py [RUNTIME_DIR]      while a hub runs on this host
"""

from __future__ import annotations

import sys
import time

from ipc import Publisher


def main() -> None:
    """One message; it has reached every interested worker when `publish` returns."""
    runtime_dir = sys.argv[1] if len(sys.argv) > 1 else None
    with Publisher(runtime_dir) as publisher:
        publisher.publish("status/backup", {"done": True, "at": time.time()})
        print("published")


if __name__ == "__main__":
    main()
