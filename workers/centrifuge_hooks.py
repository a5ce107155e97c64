"""What an application may decide about clients of the Centrifuge protocol, and what it may do to them.

Beside the way of a message: the shell (``workers/centrifuge_client.py``) asks here before it lets a client connect,
subscribe or publish, and gives it the answers of remote procedure calls. An application derives from
:class:`CentrifugeHooks`, overrides what it wants to decide, and gives an instance to ``create_hub(manager, hooks)``.
What is not overridden costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

import msgspec

if TYPE_CHECKING:
    from starlette.datastructures import Headers, QueryParams

    from workers.centrifuge_client import CentrifugeClient

BUDGET: Final = 4.5
"""Seconds that a hook may take; clients give up the connection after five. Past it the client gets error 100."""


class CentrifugeError(Exception):
    """Raised by a hook: the client's command is refused with this code (400 to 1999 are the application's own)."""

    def __init__(self, code: int, message: str = "", temporary: bool | None = None) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message
        self.temporary = temporary


class Disconnect(Exception):
    """Raised by a hook: the connection is closed. 4000 to 4499: come back; 3500 to 3999 and 4500 to 4999: stay away."""

    def __init__(self, code: int = 3503, reason: str = "force disconnect") -> None:
        super().__init__(code, reason)
        self.code = code
        self.reason = reason


class ConnectRequest(msgspec.Struct, frozen=True):
    """What a client said when it connected."""

    token: str
    data: Any
    name: str
    version: str
    headers: Mapping[str, str]
    """Headers that the client emulates, since browsers cannot set any."""


class ConnectReply(msgspec.Struct, frozen=True):
    """Lets a client in.

    Attributes:
        user: who it is; empty for nobody in particular. With one the client counts as authenticated.
        info: any JSON value, told to others as ``conn_info``.
        data: any JSON value for this client alone.
        subscriptions: topics or patterns that it is subscribed to from the server's side.
    """

    user: str = ""
    info: Any = None
    data: Any = None
    subscriptions: Iterable[str] = ()


class SubscribeReply(msgspec.Struct, frozen=True):
    """Permits a subscription: ``info`` is told to others as ``chan_info``, ``data`` to this client alone."""

    info: Any = None
    data: Any = None


class PublishReply(msgspec.Struct, frozen=True):
    """Permits a publication with other data."""

    data: Any = None


class ClientSession:
    """One client of the Centrifuge protocol, as an application sees it.

    Attributes:
        state: the application's own, empty at first.
    """

    __slots__ = ("_client", "state")

    def __init__(self, client: CentrifugeClient) -> None:
        self._client = client
        self.state: dict[str, Any] = {}

    def __repr__(self) -> str:
        return f"<ClientSession {self.client_id!r} of {self.user!r}>"

    @property
    def client_id(self) -> str:
        """Names this connection to everybody."""
        return self._client.session.client_id

    @property
    def user(self) -> str:
        """Who it is, as ``on_connect`` has said."""
        return self._client.session.user

    @property
    def channels(self) -> list[str]:
        """The topics and patterns that it is subscribed to."""
        return self._client.session.subscriptions()

    @property
    def closed(self) -> bool:
        """Whether it is gone."""
        return self._client.session.closed

    @property
    def headers(self) -> Headers:
        """Headers of the handshake."""
        return self._client.websocket.headers

    @property
    def query_params(self) -> QueryParams:
        """Query of the handshake."""
        return self._client.websocket.query_params

    def send(self, data: Any) -> None:
        """Send a message (any JSON value) to this client alone; dropped when it is gone.

        Raises:
            TypeError, ValueError: no JSON form.
        """
        self._client.send(data)

    def subscribe(self, channel: str, *, recoverable: bool = True, join_leave: bool = False) -> None:
        """Subscribe it from the server's side.

        Raises:
            InvalidTopic: no topic or pattern.
            ValueError: it has as many subscriptions as are allowed.
        """
        self._client.subscribe(channel, recoverable, join_leave)

    def unsubscribe(self, channel: str, code: int = 2000) -> None:
        """End a subscription. 2000 to 2499: for good; 2500 to 2999: it subscribes again at once, and recovers.

        Raises:
            ValueError: another code.
        """
        self._client.unsubscribe(channel, code)

    def disconnect(self, code: int = 3503, reason: str = "force disconnect") -> None:
        """Close the connection, see :class:`Disconnect` for the codes.

        Raises:
            ValueError: a code that is not from 3000 to 4999, or a reason of more than 123 bytes.
        """
        self._client.disconnect(code, reason)


class CentrifugeHooks:
    """Override what the application decides. Each may raise :class:`CentrifugeError` or :class:`Disconnect`.

    Topic rules hold as well: what they forbid is not even asked. Each hook has :data:`BUDGET` seconds.
    """

    async def on_connect(self, session: ClientSession, request: ConnectRequest) -> ConnectReply | None:
        """Who is it? None lets it in as nobody."""
        return None

    async def on_subscribe(self, session: ClientSession, channel: str, data: Any) -> SubscribeReply | None:
        """May it subscribe to this topic or pattern? ``data`` is what the client says about it."""
        return None

    async def on_publish(self, session: ClientSession, channel: str, data: Any) -> PublishReply | None:
        """May it publish this? None: as it is."""
        return None

    async def on_rpc(self, session: ClientSession, method: str, data: Any) -> Any:
        """Answer a remote procedure call with any JSON value."""
        raise CentrifugeError(104)

    async def on_message(self, session: ClientSession, data: Any) -> None:
        """Take a message that wants no answer."""

    async def on_disconnect(self, session: ClientSession, code: int, reason: str) -> None:
        """A client that had connected is gone."""
