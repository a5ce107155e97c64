"""The official clients, as the set-up of the tests has installed them, and the hub they are driven against."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PYTHON = HERE / ".venv" / "bin" / "python"
HOOKED = "tests.clients.hub_app:app"

RULES = """
[topics."h/#"]
history_size = 200
[topics."acc/#"]
history_size = 100000
[topics."chat"]
history_size = 200
presence = true
[topics."chat/#"]
presence = true
[topics."closed/#"]
publish = "nobody"
"""

needs_node = pytest.mark.skipif(
    shutil.which("node") is None or not (HERE / "node_modules" / "centrifuge").is_dir(),
    reason="centrifuge from npm is not there: run .ci/client-packages",
)
needs_python = pytest.mark.skipif(
    not PYTHON.exists(), reason="centrifuge-python is not there: run .ci/client-packages"
)


def address(port: int) -> str:
    return f"ws://127.0.0.1:{port}/connection/websocket"


def node(script: str, *arguments: str) -> subprocess.Popen[str]:
    """Start a script with the JavaScript client."""
    return subprocess.Popen(
        ["node", str(HERE / script), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def python(script: str, *arguments: str) -> subprocess.Popen[str]:
    """Start a script with the Python client."""
    return subprocess.Popen(
        [str(PYTHON), "-W", "ignore", str(HERE / script), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], timeout: float = 50.0, text: str | None = None) -> str:
    """Wait for a script; what it says, if it has ended well."""
    try:
        out, errors = process.communicate(text, timeout)
    except BaseException:
        process.kill()
        out, errors = process.communicate()
        raise AssertionError(f"the script did not end: {out[-3000:]}\n{errors[-3000:]}") from None
    assert process.returncode == 0, errors[-5000:] + out[-2000:]
    return out
