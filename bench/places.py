"""Where the benchmarks keep what they build, install and measure: nothing outside this directory is touched."""

from __future__ import annotations

import os
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
BIN = HERE / "bin"
"""Compiled programs: the load generator and the limit server."""
PEERS = Path(os.environ.get("FLOCKWIRE_BENCH_PEERS", HERE / ".peers"))
"""Other people's servers, installed by ``python -m bench.install_peers``."""
RESULTS = HERE / "results"
"""One JSON file per run."""
