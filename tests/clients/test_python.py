"""The official Python client (PyPI `centrifuge-python`) against a hub with four workers."""

from __future__ import annotations

from tests.clients.support import HOOKED, RULES, address, finish, needs_python, python
from tests.hub import Hub

pytestmark = needs_python


def test_scenario() -> None:
    with Hub(workers=4, config=RULES, app=HOOKED) as hub:
        finish(python("scenario.py", address(hub.port)))
