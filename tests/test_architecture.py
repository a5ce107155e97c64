"""Rules that keep the tree readable and safe: import direction, sizes, what loads what, what nobody uses."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ("ipc", "workers", "supervisor")  # each may import itself and those before it
MAX_LINES = 500


def sources(*folders: str) -> list[Path]:
    """All Python files of our own in these folders; what starts with a dot was fetched or made."""
    paths = (path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return sorted(p for p in paths if not any(part.startswith(".") for part in p.relative_to(ROOT).parts))


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=name(path))


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports anywhere in it, also inside functions and by `import_module`."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(tree(path)):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                base = [*package[: len(package) - level + 1]] if level else []
                start = ".".join([*base, *([module] if module else [])])
                yield start
                yield from (f"{start}.{alias.name}" for alias in names)
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(module)), *_],
            ):
                yield module


def names_used(path: Path) -> Iterator[str]:
    """Calls of plain names, and attributes of plain names as `module.attribute`."""
    for node in ast.walk(tree(path)):
        match node:
            case ast.Call(func=ast.Name(id=called)):
                yield called
            case ast.Attribute(value=ast.Name(id=owner), attr=attribute):
                yield f"{owner}.{attribute}"


def is_in(module: str, packages: set[str]) -> bool:
    return module.split(".")[0] in packages


@pytest.mark.parametrize("path", sources(*LAYERS), ids=name)
def test_imports_go_from_supervisor_to_workers_to_ipc(path: Path) -> None:
    layer = path.relative_to(ROOT).parts[0]
    above = set(LAYERS[LAYERS.index(layer) + 1 :])
    assert [module for module in imports(path) if is_in(module, above)] == []


@pytest.mark.parametrize("path", sources("ipc"), ids=name)
def test_ipc_knows_no_websocket_and_no_http(path: Path) -> None:
    foreign = {"starlette", "fastapi", "uvicorn", "websockets", "httptools", "http", "click"}
    assert [module for module in imports(path) if is_in(module, foreign)] == []


@pytest.mark.parametrize("path", sources("ipc", "workers"), ids=name)
def test_only_the_supervisor_makes_processes(path: Path) -> None:
    assert [module for module in imports(path) if is_in(module, {"multiprocessing", "subprocess"})] == []
    assert {"os.fork", "os.forkpty", "os.posix_spawn", "os.system", "os.waitpid"}.isdisjoint(names_used(path))


PURE = [
    path
    for path in sources(*LAYERS)
    if name(path) in ("ipc/topics.py", "ipc/rules.py", "workers/subscriptions.py", "workers/codes.py")
]


@pytest.mark.parametrize("path", PURE, ids=name)
def test_policy_is_pure(path: Path) -> None:
    shell = {"asyncio", "fcntl", "lmdb", "logging", "mmap", "os", "random", "select", "socket", "threading"}
    assert [module for module in imports(path) if is_in(module, {*shell, "time", "uvloop", "zmq"})] == []


@pytest.mark.parametrize("path", sources(*LAYERS), ids=name)
def test_nothing_that_runs_foreign_data_or_shares_memory_by_a_tracker(path: Path) -> None:
    """S20; and `shared_memory`, whose resource tracker destroys what other processes still use."""
    modules = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "yaml"}
    assert [module for module in imports(path) if is_in(module, modules)] == []
    shared = ("multiprocessing.shared_memory", "multiprocessing.Queue", "multiprocessing.queues")
    assert [module for module in imports(path) if module.startswith(shared)] == []
    called = {"eval", "exec", "multiprocessing.Queue", "multiprocessing.shared_memory", "yaml.load"}
    assert called.isdisjoint(names_used(path))


@pytest.mark.parametrize("path", sources(*LAYERS, "tests", "bench", "examples"), ids=name)
def test_no_file_is_long(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_LINES


@pytest.mark.parametrize("path", sources(*LAYERS), ids=name)
def test_each_file_says_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(tree(path))


@pytest.mark.parametrize(
    "module", ["ipc", "ipc.topics", "ipc.rules", "ipc.board", "workers", "workers.settings", "supervisor"]
)
def test_what_the_supervisor_reads_loads_neither_zmq_nor_lmdb(module: str) -> None:
    heavy = ("zmq", "lmdb", "uvicorn", "uvloop", "fastapi", "websockets", "redis")
    program = f"import sys, {module}; print(*(name for name in {heavy} if name in sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=30, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.split() == []


# --- the rules above see what they are meant to see ---


def test_the_finder_sees_imports_wherever_they_hide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "ipc" / "module.py"
    path.parent.mkdir()
    path.write_text(
        "import a.b\n"
        "from c import d\n"
        "from . import e\n"
        "from .f import g\n"
        "from .. import workers\n"
        "def function():\n"
        "    import supervisor.cli as x\n"
        "    if TYPE_CHECKING:\n"
        "        from h.i import j\n"
        "    importlib.import_module('k.l')\n"
        "    eval('1')\n"
        "    yaml.load(x)\n"
    )
    found = set(imports(path))
    assert found >= {"a.b", "c.d", "ipc.e", "ipc.f.g", "supervisor.cli", "h.i.j", "k.l"}
    assert any(is_in(module.lstrip("."), {"workers"}) for module in found)
    assert set(names_used(path)) >= {"eval", "yaml.load", "importlib.import_module"}
