"""The command line: ``flockwire [OPTIONS]`` serves, ``flockwire COMMAND`` talks to a running hub.

No message passes here. The options come from :mod:`supervisor.click_options`, the commands from
:mod:`supervisor.commands`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import click

from supervisor.click_options import serving_options
from supervisor.commands import COMMANDS
from supervisor.restart import EXIT_INTERRUPTED, EXIT_OK, EXIT_USAGE
from supervisor.status import version
from workers.settings import SettingsError, load_settings

HELP = """Serve WebSocket clients from every core, on one port.

Without a COMMAND, serves. Settings come from the options, then from the environment (FLOCKWIRE_ and the option's
name in upper case, dashes as underscores), then from the TOML file of --config (the same names with underscores,
and topic rules), then from the defaults.

Sizes are bytes, or like 64KiB and 1MiB; times are seconds.
"""


def run(arguments: Sequence[str]) -> int:
    """Run one command line.

    Returns:
        The exit code; what is wrong with the line itself is said in one line on stderr (2).
    """
    try:
        code = cli.main(args=list(arguments), prog_name="flockwire", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return EXIT_USAGE
    except click.ClickException as error:
        click.echo(f"error: {error.format_message()}", err=True)
        return EXIT_USAGE
    except SettingsError as error:
        click.echo(f"error: {error}", err=True)
        return EXIT_USAGE
    except (click.Abort, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    return code if isinstance(code, int) else EXIT_OK


@click.group(invoke_without_command=True, help=HELP)
@serving_options
@click.version_option(version(), prog_name="flockwire")
@click.pass_context
def cli(context: click.Context, /, config: str | None, **options: Any) -> int:
    """Serve, unless a command follows."""
    context.obj = {"config": config, **options}
    if context.invoked_subcommand is not None:
        return EXIT_OK
    settings = load_settings(options, os.environ, config)
    from supervisor.serve import serve

    return serve(settings)


for command in COMMANDS:
    cli.add_command(command)
