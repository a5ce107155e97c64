"""What one Centrifuge session says: who speaks, the lines for its client, the effects for its shell, in order.

Used by `workers/centrifuge.py` and `workers/centrifuge_channels.py`, which share one `Output` per connection.
Lines that follow each other leave in one message; an effect between two lines parts them, so that whatever its
answer is comes after what was said before.
"""

from __future__ import annotations

from collections.abc import Iterable

from .centrifuge_effects import Effect, Refusal, Send
from .centrifuge_messages import encode_client_info, encode_error
from .codes import ErrorCode


class Identity:
    """Who a client is to the others. `user` is empty as long as nobody knows."""

    __slots__ = ("_conn_info", "_info", "client_id", "user")

    def __init__(self, client_id: str) -> None:
        self.client_id = client_id
        self.user = ""
        self.set("", b"")

    def set(self, user: str, conn_info: bytes) -> None:
        """The application has said who it is; `conn_info` is a JSON text or empty."""
        self.user = user
        self._conn_info = conn_info
        self._info = encode_client_info(user, self.client_id, conn_info)

    def info(self, chan_info: bytes = b"") -> bytes:
        """Return the ClientInfo, with what a subscription adds to it."""
        if not chan_info:
            return self._info
        return encode_client_info(self.user, self.client_id, self._conn_info, chan_info)


class Output:
    """Collects what one call of the shell leads to.

    Attributes:
        in_flight: commands that wait for their answer.
    """

    __slots__ = ("_effects", "_lines", "in_flight")

    def __init__(self) -> None:
        self.in_flight = 0
        self._lines: list[bytes] = []
        self._effects: list[Effect] = []

    def line(self, line: bytes) -> None:
        """Say one JSON object to the client."""
        self._lines.append(line)

    def lines(self, lines: Iterable[bytes]) -> None:
        """Say several."""
        self._lines.extend(lines)

    def reply(self, line: bytes, recovery: bool) -> None:
        """Say one that may hold recovered publications, and then leaves alone, for it is counted differently."""
        if recovery:
            self.emit(Send(line, recovery=True))
        else:
            self._lines.append(line)

    def error(self, number: int, code: ErrorCode, message: str = "") -> None:
        """Answer a command with an error of ours."""
        self._lines.append(encode_error(number, code, message))

    def refuse(self, number: int, error: int | Refusal) -> None:
        """Answer a command with an error of the shell's."""
        if isinstance(error, Refusal):
            self._lines.append(encode_error(number, error.code, error.message, error.temporary))
        else:
            self._lines.append(encode_error(number, error))

    def emit(self, effect: Effect) -> None:
        """Want something done after what was said so far."""
        self._join()
        self._effects.append(effect)

    def ask(self, effect: Effect) -> None:
        """Want something done that will be answered."""
        self.in_flight += 1
        self.emit(effect)

    def answered(self) -> None:
        """It was."""
        if self.in_flight:
            self.in_flight -= 1

    def take(self) -> list[Effect]:
        """Return all of it."""
        self._join()
        taken, self._effects = self._effects, []
        return taken

    def _join(self) -> None:
        if self._lines:
            self._effects.append(Send(b"\n".join(self._lines)))
            self._lines = []
