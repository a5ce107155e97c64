"""The options of the command line, made from the table in :mod:`workers.options`. No message passes here.

Values stay text: :mod:`workers.settings` checks them, so that options, environment and TOML fail with the same words.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from workers.options import BY_NAME, OPTIONS, Option

Command = Callable[..., Any]


def _click_option(option: Option) -> Callable[[Command], Command]:
    """One line of the table as an option of click; the value stays text, to be checked with all others."""
    bounds = f" ({option.shown_bounds})" if option.shown_bounds else ""
    words = f"{option.help} [default: {option.shown_default}]{bounds}"
    if option.is_switch:
        return click.option(f"{option.flag}/--no-{option.flag[2:]}", option.name, default=None, help=words)
    return click.option(
        option.flag,
        option.name,
        type=click.UNPROCESSED,
        multiple=option.is_list,
        metavar=option.metavar,
        help=words,
    )


def serving_options(command: Command) -> Command:
    """All options of the table, and ``--config``."""
    for option in reversed(OPTIONS):
        command = _click_option(option)(command)
    return click.option("--config", metavar="FILE", help="TOML file of settings. [default: none]")(command)


def hub_options(command: Command) -> Command:
    """What says which running hub is meant."""
    for name in ("port", "runtime_dir"):
        command = _click_option(BY_NAME[name])(command)
    return click.option("--config", metavar="FILE", help="TOML file that names it. [default: none]")(command)
