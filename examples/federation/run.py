"""Three hosts on one machine: three hubs with the chat, joined by a Redis of their own. Ctrl-C ends all of it.

python run.py                         what you write on one page appears on all three
python run.py --redis-url redis://…   through a Redis that runs already
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


def main() -> int:
    """Start everything, wait for Ctrl-C, end everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hosts", type=int, default=3, help="how many (3)")
    parser.add_argument("--port", type=int, default=8001, help="of the first; the others follow (8001)")
    parser.add_argument("--redis-url", help="instead of a Redis of our own")
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    redis: list[subprocess.Popen[bytes]] = []
    hubs: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory(prefix="fw-federation-") as directory:
        try:
            url = asked.redis_url or start_redis(directory, redis)
            for number in range(asked.hosts):
                hub = start_hub(asked.port + number, url, Path(directory) / f"host{number}")
                # At once, to be ended if the next one does not start.
                hubs.append(hub)
            for number in range(asked.hosts):
                await_port(asked.port + number, redis + hubs)
                where = f"python -m supervisor status --runtime-dir {directory}/host{number}"
                print(f"host {number + 1}: http://127.0.0.1:{asked.port + number}/  ({where})", flush=True)
            while all(child.poll() is None for child in redis + hubs):
                time.sleep(0.5)
            print("one of them has ended; its log is above", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            return 0
        finally:
            for group in (hubs, redis):  # so that no hub misses its Redis
                for child in group:
                    child.terminate()
                for child in group:
                    child.wait()


def await_port(port: int, children: list[subprocess.Popen[bytes]]) -> None:
    """Wait until somebody listens there, or one of the children has ended."""
    while all(child.poll() is None for child in children):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)


def start_redis(directory: str, children: list[subprocess.Popen[bytes]]) -> str:
    """A Redis that keeps nothing on disk, on a free port."""
    if shutil.which("redis-server") is None:
        sys.exit("redis-server is not installed; install it, or name a running one: --redis-url redis://…")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--port", str(port), "--save", "", "--dir", directory, "--maxmemory-policy", "noeviction"]
    # In a session of their own: Ctrl-C is for this program, which ends them in order.
    children.append(
        subprocess.Popen(["redis-server", *options], stdout=subprocess.DEVNULL, start_new_session=True)
    )
    return f"redis://127.0.0.1:{port}"


def start_hub(port: int, url: str, runtime_dir: Path) -> subprocess.Popen[bytes]:
    """One host: a hub of two workers with a runtime directory, and so an identity, of its own."""
    return subprocess.Popen(
        [
            sys.executable, "-m", "supervisor", "--app", "chat:app", "--port", str(port), "--workers", "2",
            "--runtime-dir", str(runtime_dir), "--redis-url", url, "--log-level", "warning",
        ],
        cwd=HERE.parent,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
        start_new_session=True,
    )  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
