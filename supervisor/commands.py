"""The commands that talk to a running hub: ``status``, ``stop``, ``reload``, ``scale``, ``publish`` and others.

``publish`` and ``tail`` are processes on the bus of their own; the others ask the supervisor over the control socket.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import click
import msgspec

from ipc.runtime import RuntimeDirError, default_runtime_dir
from ipc.topics import InvalidTopic, check_topic, shown
from supervisor import banner, status
from supervisor.click_options import hub_options, serving_options
from supervisor.control import Answer, HubNotRunning, ask
from supervisor.restart import EXIT_FAILURE, EXIT_OK
from supervisor.seat import counted
from workers.options import MAX_WORKERS
from workers.settings import find_hub, load_settings

PROMPT = 10.0
"""Seconds for an answer that the hub has at once."""
MARGIN = 15.0
"""Seconds that a command waits beyond the hub's own time limits."""

_channel_option = click.option(
    "--channel",
    default="hub",
    metavar="NAME",
    help="The name that the application gave its WebSocketManager. [default: hub, the built-in hub's]",
)

WAIT_HELP = "Seconds to wait until it is done. [default: as long as the hub's own time limits allow]"


@click.command("status")
@hub_options
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of a table.")
@click.pass_context
def status_command(context: click.Context, /, as_json: bool, **options: Any) -> int:
    """Show what the running hub is doing."""

    def show(runtime_dir: str) -> int:
        answer = _status(runtime_dir)
        del answer["ok"]
        click.echo(json.dumps(answer) if as_json else status.render(answer))
        return EXIT_OK

    return _on_hub(context, options, show)


@click.command()
@hub_options
@click.option("--timeout", type=click.FloatRange(min=0), help=WAIT_HELP)
@click.pass_context
def stop(context: click.Context, /, timeout: float | None, **options: Any) -> int:
    """Drain all workers and end the hub."""

    def act(runtime_dir: str) -> int:
        limits = _status(runtime_dir)["settings"]
        wait = limits["drain_timeout"] + MARGIN if timeout is None else timeout
        _expect(ask(runtime_dir, {"command": "stop"}, wait))
        return EXIT_OK

    return _on_hub(context, options, act)


@click.command()
@hub_options
@click.option("--timeout", type=click.FloatRange(min=0), help=WAIT_HELP)
@click.pass_context
def reload(context: click.Context, /, timeout: float | None, **options: Any) -> int:
    """Replace all workers by new ones, one after the other; new code is loaded."""

    def act(runtime_dir: str) -> int:
        hub = _status(runtime_dir)
        limits = hub["settings"]
        rounds = 2 * hub["target"] * limits["boot_timeout"] + limits["drain_timeout"]
        answer = _expect(
            ask(runtime_dir, {"command": "reload"}, rounds + MARGIN if timeout is None else timeout)
        )
        click.echo(f"{counted(answer['workers'])} new")
        return EXIT_OK

    return _on_hub(context, options, act)


@click.command()
@click.argument("workers", type=int, metavar="N")
@hub_options
@click.option("--timeout", type=click.FloatRange(min=0), help=WAIT_HELP)
@click.pass_context
def scale(context: click.Context, /, workers: int, timeout: float | None, **options: Any) -> int:
    """Run N workers from now on, 1 to 64."""
    if not 1 <= workers <= MAX_WORKERS:
        raise click.UsageError(f"N = {workers}: must be an integer from 1 to {MAX_WORKERS}")

    def act(runtime_dir: str) -> int:
        limits = _status(runtime_dir)["settings"]
        wait = limits["boot_timeout"] + limits["drain_timeout"] + MARGIN if timeout is None else timeout
        answer = _expect(ask(runtime_dir, {"command": "scale", "workers": workers}, wait))
        click.echo(counted(answer["workers"]))
        return EXIT_OK

    return _on_hub(context, options, act)


@click.command()
@click.argument("topic")
@click.argument("data", metavar="JSON")
@_channel_option
@hub_options
@click.pass_context
def publish(context: click.Context, /, topic: str, data: str, channel: str, **options: Any) -> int:
    """Publish a message, any JSON value, to a topic of the running hub."""
    try:
        check_topic(topic)
        value = msgspec.json.decode(data)
    except InvalidTopic as error:
        raise click.UsageError(str(error)) from None
    except (msgspec.DecodeError, UnicodeError) as error:
        raise click.UsageError(f"JSON = {shown(data)}: must be a JSON value: {error}") from None

    def act(runtime_dir: str) -> int:
        from ipc.publisher import HubNotFound, Publisher

        try:
            with Publisher(runtime_dir, channel=channel) as publisher:
                publisher.publish(topic, value)
        except HubNotFound as error:
            raise HubNotRunning(f"no hub is running in {runtime_dir}") from error
        except (TimeoutError, ValueError, OverflowError) as error:
            raise _Failed(str(error)) from error
        return EXIT_OK

    return _on_hub(context, options, act)


@click.command()
@click.argument("pattern")
@_channel_option
@hub_options
@click.pass_context
def tail(context: click.Context, /, pattern: str, channel: str, **options: Any) -> int:
    """Print what is published to topics that match PATTERN, one JSON line a message, until interrupted."""
    from supervisor import tail as tailing

    try:
        tailing.check(pattern)
    except InvalidTopic as error:
        raise click.UsageError(str(error)) from None

    def act(runtime_dir: str) -> int:
        _status(runtime_dir)  # or a hub that is not there would be made
        if not tailing.follow(runtime_dir, channel, pattern):
            raise _Failed(f"the hub in {runtime_dir} has ended")
        return EXIT_OK

    return _on_hub(context, options, act)


@click.command()
@serving_options
@click.pass_context
def check(context: click.Context, /, config: str | None, **options: Any) -> int:
    """Validate the configuration and show what would be in force."""
    outer = dict(context.obj)
    outer_config = outer.pop("config")
    given = {**outer, **{name: value for name, value in options.items() if value not in (None, ())}}
    settings = load_settings(given, os.environ, config or outer_config)
    runtime_dir = settings.runtime_dir or default_runtime_dir(settings.port)
    click.echo("ok")
    click.echo(banner.render(banner.describe(settings, settings.port, runtime_dir)))
    return EXIT_OK


class _Failed(Exception):
    """The hub, or the bus, refused."""


def _on_hub(context: click.Context, /, options: dict[str, Any], act: Callable[[str], int]) -> int:
    """Find the hub that is meant and do something with it; what goes wrong is said in one line (exit code 1)."""
    runtime_dir = _locate(context, options)
    try:
        return act(runtime_dir)
    except (HubNotRunning, RuntimeDirError, _Failed) as error:
        click.echo(f"error: {error}", err=True)
    except TimeoutError:
        click.echo("error: the hub has not done it in time; it may still do so, see its log", err=True)
    return EXIT_FAILURE


def _locate(context: click.Context, /, options: dict[str, Any]) -> str:
    """The runtime directory by the options before or after the command's name, the environment or the file."""
    outer = context.obj
    for name, value in outer.items():
        if value not in (None, ()) and name not in ("config", "port", "runtime_dir"):
            flag = f"--{name.replace('_', '-')}"
            said = "..." if name == "redis_url" else shown(value)  # it may hold a password
            raise click.UsageError(
                f"{flag} = {said}: is for serving, not for the command {context.info_name}"
            )
    given = {
        name: outer[name] if options[name] is None else options[name] for name in ("port", "runtime_dir")
    }
    port, runtime_dir = find_hub(given, os.environ, options["config"] or outer["config"])
    return os.path.abspath(runtime_dir or default_runtime_dir(port))


def _status(runtime_dir: str) -> Answer:
    answer = ask(runtime_dir, {"command": "status"}, PROMPT)
    if answer is None:
        raise HubNotRunning(f"no hub is running in {runtime_dir}: it has just ended")
    return _expect(answer)


def _expect(answer: Answer | None) -> Answer:
    """The answer, unless it is a refusal; none at all is the answer of a hub that has ended."""
    if answer is None:
        return {}
    if not answer["ok"]:
        raise _Failed(answer["error"])
    return answer


COMMANDS = (status_command, reload, stop, scale, publish, tail, check)
