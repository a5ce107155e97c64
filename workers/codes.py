"""Error and close codes: what clients are told when something goes wrong, and whether to come back.

Error codes answer one message and the connection stays open; they are the same in the plain and in the
Centrifuge protocol. Close codes end the connection. Clients are written against these numbers: none changes
its meaning, new ones are added. Reasons are plain words of at most 123 bytes (RFC 6455, section 5.5).
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final, NamedTuple

MAX_REASON_BYTES: Final = 123
"""What fits into a close frame beside the code (RFC 6455, section 5.5)."""

MAX_ERRORS_IN_A_ROW: Final = 10
"""After so many errors without a valid message in between a connection is closed with `TOO_MANY_ERRORS`."""


class ErrorCode(IntEnum):
    """Why a message of a client was refused."""

    INTERNAL = 100
    UNAUTHORIZED = 101
    UNKNOWN_CHANNEL = 102
    PERMISSION_DENIED = 103
    METHOD_NOT_FOUND = 104
    ALREADY_SUBSCRIBED = 105
    LIMIT_EXCEEDED = 106
    BAD_REQUEST = 107
    NOT_AVAILABLE = 108
    TOKEN_EXPIRED = 109
    EXPIRED = 110
    TOO_MANY_REQUESTS = 111
    UNRECOVERABLE_POSITION = 112
    CONCURRENT_PAGINATION = 113

    @property
    def message(self) -> str:
        """The code in words, for clients that are told nothing more exact."""
        return _MESSAGES[self]

    @property
    def temporary(self) -> bool:
        """Whether the same message may succeed later."""
        return self in _TEMPORARY


class Close(NamedTuple):
    """How a connection ends: a close code and its reason.

    Clients of the Centrifuge protocol come back after codes below 3500 and from 4000 to 4499, and stay away
    after the others from 3500 on.
    """

    code: int
    reason: str


def closing(code: int, reason: str) -> Close:
    """What to put into a close frame: the code, and as much of the reason as fits.

    Raises:
        ValueError: the code may not be sent (RFC 6455, section 7.4).
    """
    if not (1000 <= code <= 1003 or 1007 <= code <= 1014 or 3000 <= code <= 4999):
        raise ValueError(
            f"{code!r} is no code to close with: use 1000 to 1003, 1007 to 1014, or 3000 to 4999"
        )
    return Close(code, reason.encode(errors="replace")[:MAX_REASON_BYTES].decode(errors="ignore"))


# RFC 6455, section 7.4.1, and IANA's registry.
NORMAL: Final = Close(1000, "")
GOING_AWAY: Final = Close(1001, "the hub is stopping")
PROTOCOL_ERROR: Final = Close(1002, "protocol error")
UNSUPPORTED_DATA: Final = Close(1003, "only text messages are understood")
INVALID_TEXT: Final = Close(1007, "text is not valid UTF-8")
POLICY_VIOLATION: Final = Close(1008, "policy violation")
MESSAGE_TOO_BIG: Final = Close(1009, "message is too big")
INTERNAL_ERROR: Final = Close(1011, "internal error")
SERVICE_RESTART: Final = Close(1012, "the worker is being replaced, connect again")
SLOW_CLIENT: Final = Close(1013, "reads too slowly, try again later")
BAD_GATEWAY: Final = Close(1014, "the server behind this one cannot be reached")

# The Centrifuge protocol: after these a client comes back ...
CONNECTION_CLOSED: Final = Close(3000, "connection closed")
SHUTDOWN: Final = Close(3001, "shutdown")
SERVER_ERROR: Final = Close(3004, "internal server error")
CONNECTION_EXPIRED: Final = Close(3005, "connection expired")
SUBSCRIPTION_EXPIRED: Final = Close(3006, "subscription expired")
SLOW: Final = Close(3008, "slow")
WRITE_ERROR: Final = Close(3009, "write error")
INSUFFICIENT_STATE: Final = Close(3010, "insufficient state")
FORCE_RECONNECT: Final = Close(3011, "force reconnect")
NO_PONG: Final = Close(3012, "no pong")
TOO_MANY_REQUESTS: Final = Close(3013, "too many requests")
STATE_INVALIDATED: Final = Close(3014, "state invalidated")

# ... and after these it stays away.
INVALID_TOKEN: Final = Close(3500, "invalid token")
BAD_REQUEST: Final = Close(3501, "bad request")
STALE: Final = Close(3502, "stale")
FORCE_DISCONNECT: Final = Close(3503, "force disconnect")
CONNECTION_LIMIT: Final = Close(3504, "connection limit")
CHANNEL_LIMIT: Final = Close(3505, "channel limit")
INAPPROPRIATE_PROTOCOL: Final = Close(3506, "inappropriate protocol")
PERMISSION_DENIED: Final = Close(3507, "permission denied")
NOT_AVAILABLE: Final = Close(3508, "not available")
TOO_MANY_ERRORS: Final = Close(3509, "too many errors")

_MESSAGES: Final[dict[int, str]] = {
    ErrorCode.INTERNAL: "internal server error",
    ErrorCode.UNAUTHORIZED: "unauthorized",
    ErrorCode.UNKNOWN_CHANNEL: "unknown channel",
    ErrorCode.PERMISSION_DENIED: "permission denied",
    ErrorCode.METHOD_NOT_FOUND: "method not found",
    ErrorCode.ALREADY_SUBSCRIBED: "already subscribed",
    ErrorCode.LIMIT_EXCEEDED: "limit exceeded",
    ErrorCode.BAD_REQUEST: "bad request",
    ErrorCode.NOT_AVAILABLE: "not available",
    ErrorCode.TOKEN_EXPIRED: "token expired",
    ErrorCode.EXPIRED: "expired",
    ErrorCode.TOO_MANY_REQUESTS: "too many requests",
    ErrorCode.UNRECOVERABLE_POSITION: "unrecoverable position",
    ErrorCode.CONCURRENT_PAGINATION: "concurrent pagination",
}
_TEMPORARY: Final = frozenset(
    {ErrorCode.INTERNAL, ErrorCode.TOO_MANY_REQUESTS, ErrorCode.CONCURRENT_PAGINATION}
)
