"""The exceptions of endpoints, and the decorators that handle them."""

from __future__ import annotations

import inspect
from typing import Any, cast

import pytest

from tests.support import run
from workers.connection import Connection
from workers.errors import (
    InvalidSubscription,
    InvalidSubscriptionMessage,
    WebSocketException,
    ahandle,
    handle,
)

CONNECTION = cast(Connection, object())


class Recorder:
    """A handler that remembers what it was called with."""

    def __init__(self) -> None:
        self.errors: list[BaseException] = []

    def plain(self, error: BaseException) -> str:
        self.errors.append(error)
        return "handled"

    async def asynchronous(self, error: BaseException) -> str:
        self.errors.append(error)
        return "handled"


# The exceptions


@pytest.mark.parametrize("kind", [WebSocketException, InvalidSubscription, InvalidSubscriptionMessage])
def test_a_websocket_exception_is_an_ordinary_exception_with_its_fields(
    kind: type[WebSocketException],
) -> None:
    error = kind("no such topic", connection=CONNECTION)
    assert isinstance(error, Exception)
    assert isinstance(error, WebSocketException)
    assert error.message == str(error) == "no such topic"
    assert error.connection is CONNECTION
    assert error.code == 107
    assert kind("no", connection=CONNECTION, code=103).code == 103


def test_the_connection_is_named() -> None:
    with pytest.raises(TypeError):
        WebSocketException("no", CONNECTION)  # type: ignore[call-arg]


# handle


def test_handle_calls_the_handler_and_returns_its_result() -> None:
    recorder = Recorder()

    @handle(ValueError, recorder.plain)
    def endpoint(number: int, *, add: int = 0) -> int:
        if number < 0:
            raise ValueError("negative")
        return number + add

    assert endpoint(1, add=2) == 3
    assert recorder.errors == []
    assert endpoint(-1) == "handled"
    assert [str(error) for error in recorder.errors] == ["negative"]


def test_handle_takes_a_tuple_and_lets_others_pass() -> None:
    recorder = Recorder()

    @handle((ValueError, KeyError), recorder.plain)
    def endpoint(error: Exception) -> None:
        raise error

    endpoint(ValueError())
    endpoint(KeyError())
    with pytest.raises(RuntimeError):
        endpoint(RuntimeError())
    assert [type(error) for error in recorder.errors] == [ValueError, KeyError]


@pytest.mark.parametrize("name", ["plain", "asynchronous"])
def test_handle_on_an_async_function_handles_what_it_raises_when_awaited(name: str) -> None:
    recorder = Recorder()

    @handle(WebSocketException, getattr(recorder, name))
    async def endpoint(fail: bool) -> str:
        if fail:
            raise InvalidSubscription("no", connection=CONNECTION)
        return "fine"

    assert inspect.iscoroutinefunction(endpoint)
    assert run(endpoint(False)) == "fine"
    assert run(endpoint(True)) == "handled"
    assert len(recorder.errors) == 1


def test_handle_refuses_a_handler_nobody_could_await() -> None:
    with pytest.raises(TypeError, match="ahandle"):
        handle(ValueError, Recorder().asynchronous)(lambda: None)


def test_an_error_in_the_handler_goes_up() -> None:
    def handler(error: ValueError) -> None:
        raise KeyError("in the handler")

    with pytest.raises(KeyError):
        handle(ValueError, handler)(lambda: int("x"))()


# ahandle


@pytest.mark.parametrize("name", ["plain", "asynchronous"])
def test_ahandle_takes_plain_and_async_functions_and_handlers(name: str) -> None:
    recorder = Recorder()

    @ahandle((ValueError, KeyError), getattr(recorder, name))
    async def asynchronous(text: str) -> int:
        return int(text)

    @ahandle(ValueError, getattr(recorder, name))
    def plain(text: str) -> int:
        return int(text)

    for endpoint in (asynchronous, plain):
        assert inspect.iscoroutinefunction(endpoint)
        assert run(endpoint("5")) == 5
        assert run(endpoint("x")) == "handled"
    assert len(recorder.errors) == 2


def test_ahandle_lets_other_exceptions_pass() -> None:
    @ahandle(ValueError, Recorder().plain)
    async def endpoint() -> None:
        raise KeyError("other")

    with pytest.raises(KeyError):
        run(endpoint())


@pytest.mark.parametrize("decorator", [handle, ahandle])
def test_the_decorated_function_keeps_its_name_and_signature(decorator: Any) -> None:
    async def endpoint(websocket: int, *, topic: str = "a") -> None:
        """What it does."""

    decorated = decorator(ValueError, print)(endpoint)
    assert decorated.__name__ == "endpoint"
    assert decorated.__doc__ == "What it does."
    assert inspect.signature(decorated) == inspect.signature(endpoint)


def test_methods_and_callable_objects_can_be_decorated() -> None:
    class Service:
        @ahandle(ValueError, Recorder().plain)
        async def method(self, text: str) -> int:
            return int(text)

    class Callable:
        async def __call__(self) -> None:
            raise ValueError

    assert run(Service().method("x")) == "handled"
    assert run(cast(Any, handle(ValueError, Recorder().plain)(Callable()))()) == "handled"
