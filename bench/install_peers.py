"""Install the peers by name: ``python -m bench.install_peers [NAME …]``, what ``make bench-peers`` runs.

Everything goes to ``bench/.peers``: a virtual environment, npm packages, and Debian packages that are
downloaded and unpacked, not installed, so that no service is started and no root is needed. Removing the
directory removes it all.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.places import PEERS

VENV = PEERS / "venv"
NODE = PEERS / "node"
DEBIAN = PEERS / "debian"


def run(command: Sequence[str | Path], cwd: Path | None = None) -> str:
    """Run a command, shown, and return what it printed; its own error is shown when it fails."""
    print("  $", " ".join(map(str, command)), flush=True)
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError((done.stderr or done.stdout).strip().splitlines()[-1])
    return done.stdout


def pip(*packages: str) -> None:
    """Install into the peers' own environment: their pins must not move the project's."""
    if not (VENV / "bin" / "python").exists():
        venv.create(VENV, with_pip=True)
    run([VENV / "bin" / "python", "-m", "pip", "install", "--quiet", *packages])


def npm(*packages: str) -> None:
    """Install npm packages side by side in one prefix."""
    if shutil.which("npm") is None:
        raise RuntimeError("npm is not installed")
    NODE.mkdir(parents=True, exist_ok=True)
    manifest = NODE / "package.json"
    if not manifest.exists():
        manifest.write_text('{"name": "bench-peers", "private": true}\n')
    run(["npm", "install", "--no-audit", "--no-fund", "--loglevel=error", *packages], cwd=NODE)


def debian(program: str, *packages: str) -> None:
    """Unpack Debian packages and what they miss here; nothing to do when the program is installed."""
    if (
        shutil.which(program)
        or (DEBIAN / "usr" / "sbin" / program).exists()
        or (DEBIAN / "usr" / "bin" / program).exists()
    ):
        return
    if shutil.which("apt-get") is None:
        raise RuntimeError("apt-get is not here; install it by hand")
    plan = run(["apt-get", "install", "--simulate", "--no-install-recommends", *packages])
    wanted = [line.split()[1] for line in plan.splitlines() if line.startswith("Inst ")]
    archives = DEBIAN / "archives"
    archives.mkdir(parents=True, exist_ok=True)
    run(["apt-get", "download", *wanted], cwd=archives)
    for archive in sorted(archives.glob("*.deb")):
        run(["dpkg-deb", "-x", archive, DEBIAN])


def install_bun() -> None:
    """npm's `bun` carries the binary in an optional dependency of the platform; make sure it runs."""
    npm("bun")
    print("  bun", run([NODE / "node_modules" / ".bin" / "bun", "--version"]).strip())


def install_nchan() -> None:
    """nginx with the Nchan module."""
    debian("nginx", "nginx", "libnginx-mod-nchan")


def install_original() -> None:
    """The library flockwire replaces, and the Redis server it needs."""
    debian("redis-server", "redis-server")
    pip("fastapi-distributed-websocket", "uvicorn", "uvloop", "websockets", "httptools")


PEERS_BY_NAME: dict[str, Callable[[], None]] = {
    "picows": lambda: pip("picows", "uvloop"),
    "bun": install_bun,
    "nchan": install_nchan,
    "socketio": lambda: npm("socket.io", "@socket.io/cluster-adapter", "@socket.io/sticky"),
    "original": install_original,
}


def main(names: Sequence[str]) -> int:
    """Install the named peers, or all; one that fails does not stop the others."""
    failed = []
    for name in names or list(PEERS_BY_NAME):
        if name not in PEERS_BY_NAME:
            print(f"no peer is called {name!r}; there are {', '.join(PEERS_BY_NAME)}", file=sys.stderr)
            return 2
        print(name, flush=True)
        try:
            PEERS.mkdir(parents=True, exist_ok=True)
            (PEERS / ".gitignore").write_text("*\n")
            PEERS_BY_NAME[name]()
        except (RuntimeError, OSError) as error:
            failed.append(name)
            print(f"  not installed: {error}", flush=True)
    print("installed" if not failed else f"not installed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
