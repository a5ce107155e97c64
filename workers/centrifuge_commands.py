"""The commands of a connected Centrifuge client: each checked, then refused or passed on to the shell.

The part of `workers/centrifuge.py` between a decoded command and its effect; subscriptions are passed on to
`workers/centrifuge_channels.py`. What only the shell can know (permissions, the application's hooks) is decided
there.
"""

from __future__ import annotations

from ipc.topics import InvalidTopic, check_topic

from . import centrifuge_effects as effects
from . import centrifuge_messages as messages
from .centrifuge_channels import Channels
from .centrifuge_output import Identity, Output
from .codes import ErrorCode


class Commands:
    """Knows what is asked by each command, and what to say to those that ask too much."""

    __slots__ = ("_channels", "_config", "_identity", "_output")

    def __init__(
        self, config: effects.Config, channels: Channels, identity: Identity, output: Output
    ) -> None:
        self._config = config
        self._channels = channels
        self._identity = identity
        self._output = output

    def perform(self, number: int, request: messages.Request) -> bool:
        """Take one command; False if it breaks the protocol, which ends the connection."""
        if number and self._output.in_flight >= self._config.max_in_flight:
            self._output.error(number, ErrorCode.TOO_MANY_REQUESTS)
            return True
        match request:
            case messages.PublishRequest():
                return self._publish(number, request)
            case messages.RpcRequest():
                self._rpc(number, request)
            case messages.SendRequest():
                if self._config.messages:
                    self._output.emit(effects.Message(bytes(request.data) or b"null"))
            case messages.RefreshRequest():
                return self._refresh(number, request)
            case messages.PingRequest():
                self._output.error(number, ErrorCode.NOT_AVAILABLE)
            case messages.ConnectRequest():
                return False
            case _:
                return self._perform_on_channel(number, request)
        return True

    def _perform_on_channel(self, number: int, request: messages.ChannelRequest) -> bool:
        if not request.channel:
            return False
        match request:
            case messages.SubscribeRequest():
                self._channels.subscribe(number, request)
            case messages.UnsubscribeRequest():
                self._channels.unsubscribe(number, request)
            case messages.HistoryRequest():
                self._history(number, request)
            case messages.PresenceRequest():
                if self._channels.fits(number, request.channel):
                    self._output.ask(effects.Presence(number, request.channel))
            case messages.PresenceStatsRequest():
                if self._channels.fits(number, request.channel):
                    self._output.ask(effects.PresenceStats(number, request.channel))
            case messages.SubRefreshRequest():
                self._sub_refresh(number, request)
        return True

    def _publish(self, number: int, request: messages.PublishRequest) -> bool:
        channel, data = request.channel, bytes(request.data)
        if not channel:
            return False
        if not data:
            self._refuse(number, "publish needs data")
            return True
        try:
            check_topic(channel)
        except InvalidTopic as exc:
            self._refuse(number, str(exc))
            return True
        subscription = self._channels.get(channel)
        info = self._identity.info(subscription.info if subscription is not None else b"")
        self._output.ask(effects.Publish(number, channel, data, info))
        return True

    def _rpc(self, number: int, request: messages.RpcRequest) -> None:
        if self._config.rpc:
            self._output.ask(effects.Rpc(number, request.method, bytes(request.data) or b"null"))
        else:
            self._output.error(number, ErrorCode.METHOD_NOT_FOUND)

    def _history(self, number: int, request: messages.HistoryRequest) -> None:
        if not self._channels.fits(number, request.channel):
            return
        since = request.since
        if request.reverse and since is not None and since.offset == 0:
            self._refuse(number, "nothing comes before offset 0")
            return
        limit = request.limit
        if limit < 0 or limit > self._config.max_history:
            limit = self._config.max_history
        self._output.ask(effects.History(number, request.channel, limit, since, request.reverse))

    def _refresh(self, number: int, request: messages.RefreshRequest) -> bool:
        if not self._config.tokens:
            self._output.error(number, ErrorCode.NOT_AVAILABLE)
            return True
        if request.token:
            self._output.ask(effects.Refresh(number, request.token))
        return bool(request.token)

    def _sub_refresh(self, number: int, request: messages.SubRefreshRequest) -> None:
        if not self._config.tokens:
            self._output.error(number, ErrorCode.NOT_AVAILABLE)
        elif not self._channels.is_live(request.channel):
            self._output.error(number, ErrorCode.PERMISSION_DENIED)
        elif not request.token:
            self._refuse(number, "sub_refresh needs a token")
        else:
            self._output.ask(effects.SubRefresh(number, request.channel, request.token))

    def _refuse(self, number: int, why: str) -> None:
        self._output.error(number, ErrorCode.BAD_REQUEST, f"bad request: {why}")
