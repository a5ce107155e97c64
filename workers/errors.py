"""The exceptions a WebSocket endpoint meets, and two decorators that turn them into something else.

    Exception
    └── WebSocketException                what one connection did wrong; only its client is told
        ├── InvalidSubscription           the topic or pattern cannot be subscribed to
        └── InvalidSubscriptionMessage    the message is no subscription message at all

They arise between a client's message and its effect: `Connection`, `subscribe` and `WebSocketManager.receive`
raise them, and whoever reads from the connection answers with their words.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

from workers.codes import ErrorCode

if TYPE_CHECKING:
    from workers.connection import Connection

P = ParamSpec("P")
R = TypeVar("R")
H = TypeVar("H")
E = TypeVar("E", bound=BaseException)


class WebSocketException(Exception):
    """A client's request that cannot be met, with the connection it came from.

    Attributes:
        message: What was wrong, in words for the client.
        connection: The connection it came from.
        code: The error code the client gets beside the words; 107, bad request, unless given.
    """

    def __init__(self, message: str, *, connection: Connection, code: int = ErrorCode.BAD_REQUEST) -> None:
        super().__init__(message)
        self.message = message
        self.connection = connection
        self.code = code

    def __str__(self) -> str:
        return self.message


class InvalidSubscription(WebSocketException):
    """A topic or pattern that cannot be subscribed to: its grammar, its length, or a rule forbids it."""


class InvalidSubscriptionMessage(WebSocketException):
    """A message that is neither `subscribe` nor `unsubscribe`, or names no topic."""


def handle(
    exc: type[E] | tuple[type[E], ...], handler: Callable[[E], H]
) -> Callable[[Callable[P, R]], Callable[P, R | H]]:
    """Decorate a function so that an exception calls a handler instead of going up.

    The decorated function returns what the handler returns. An `async def` function stays one: its exceptions
    are handled when it is awaited, and then the handler may be one too.

    Args:
        exc: The exception type, or a tuple of them. Others pass unchanged.
        handler: Called with the exception.

    Raises:
        TypeError: when decorating a plain function with an `async def` handler, which nobody could await.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R | H]:
        if _is_async(function):
            return cast("Callable[P, R | H]", ahandle(exc, handler)(function))
        if _is_async(handler):
            name = getattr(function, "__qualname__", repr(function))
            raise TypeError(
                f"the handler of {name} is async and the function is not: decorate it with ahandle"
            )

        @functools.wraps(function)
        def handled(*args: P.args, **kwargs: P.kwargs) -> R | H:
            try:
                return function(*args, **kwargs)
            except exc as error:
                return handler(error)

        return handled

    return decorate


def ahandle(
    exc: type[E] | tuple[type[E], ...], handler: Callable[[E], Any]
) -> Callable[[Callable[P, Any]], Callable[P, Coroutine[Any, Any, Any]]]:
    """As `handle`, for everything that may be async: the function, the handler, or both.

    The decorated function is always `async def`, and returns the result of the function or of the handler.

    Args:
        exc: The exception type, or a tuple of them. Others pass unchanged.
        handler: Called with the exception, and awaited if that gives an awaitable.
    """

    def decorate(function: Callable[P, Any]) -> Callable[P, Coroutine[Any, Any, Any]]:
        @functools.wraps(function)
        async def handled(*args: P.args, **kwargs: P.kwargs) -> Any:
            try:
                return await _result(function(*args, **kwargs))
            except exc as error:
                return await _result(handler(error))

        return handled

    return decorate


def _is_async(function: Callable[..., object]) -> bool:
    """Whether calling it gives a coroutine; also for objects with an `async def __call__`."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004
    )


async def _result(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value
