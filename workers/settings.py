"""Every setting of a hub, typed and validated: from options, environment, a TOML file and defaults.

Read once, by the supervisor before anything starts (or by a manager under a foreign server); frozen, and
passed down from there. No message passes here. What each option may be stands in :mod:`workers.options`.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import tomllib
from collections.abc import Mapping
from typing import Any, cast
from urllib.parse import urlsplit

import msgspec

from ipc.rules import Access, Rules, TopicRule, parse_topics
from ipc.topics import InvalidTopic, check_pattern, shown
from workers.options import BY_NAME, MAX_WORKERS, OPTIONS, Option
from workers.origin import check_allowed_origin

PREFIX = "FLOCKWIRE_"
CONFIG_VARIABLE = "FLOCKWIRE_CONFIG"
TOML_ONLY = ("topics", "client_broadcast", "client_direct")
ACCESS_WORDS = ("nobody", "authenticated", "anyone")


class SettingsError(Exception):
    """A setting is wrong; the text is one line that names the key, the value and what is allowed."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Every setting with its type; sizes in bytes, times in seconds. See :data:`workers.options.OPTIONS`."""

    host: str
    port: int
    workers: int
    app: str | None
    preload: bool
    reload: bool
    runtime_dir: str | None
    allow_origin: tuple[str, ...]
    allow_anonymous: bool
    max_message_size: int
    max_subscriptions: int
    max_backlog: int
    write_timeout: float
    bus_backlog: int
    ping_interval: float
    ping_timeout: float
    drain_timeout: float
    worker_timeout: float
    boot_timeout: float
    data_dir: str | None
    store_size: int | None
    ssl_certfile: str | None
    ssl_keyfile: str | None
    log_level: str
    log_format: str
    access_log: bool
    redis_url: str | None
    redis_prefix: str
    federate: tuple[str, ...]
    rules: Rules

    @property
    def is_tls(self) -> bool:
        """Whether clients connect by wss and https."""
        return self.ssl_certfile is not None

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """The settings of a process under a foreign server: from ``FLOCKWIRE_...`` variables and defaults.

        Who listens where is that server's affair, and anonymous clients count as allowed.

        Raises:
            SettingsError: a variable is wrong.
        """
        environ = os.environ if environ is None else environ
        found = _gather({}, environ, None)
        return _build(found, allow_anonymous=bool(found.get("allow_anonymous", True)))


def load_settings(
    options: Mapping[str, object], environ: Mapping[str, str], config_path: str | None = None
) -> Settings:
    """Put the settings of a hub together and check them.

    Args:
        options: by name with underscores, as on the command line; None means that one is not given.
        environ: the environment; variables that begin with ``FLOCKWIRE_`` count.
        config_path: the TOML file, None for the one that ``FLOCKWIRE_CONFIG`` names, if any.

    Raises:
        SettingsError: something is unknown, has the wrong type or is out of range.
    """
    found = _gather(options, environ, config_path)
    settings = _build(found, allow_anonymous=_anonymous(found), bridge=True)
    _check_together(settings)
    return settings


def find_hub(
    options: Mapping[str, object], environ: Mapping[str, str], config_path: str | None = None
) -> tuple[int, str | None]:
    """Port and runtime directory of a hub, as :func:`load_settings` would find them, for who talks to it.

    Raises:
        SettingsError: something is wrong.
    """
    found = _gather(options, environ, config_path)
    return found.get("port", BY_NAME["port"].default), found.get("runtime_dir")


def _gather(
    options: Mapping[str, object], environ: Mapping[str, str], config_path: str | None
) -> dict[str, Any]:
    """What is set, by falling precedence: options, environment, file. Defaults are not in it."""
    found: dict[str, Any] = {}
    config_path = config_path if config_path is not None else environ.get(CONFIG_VARIABLE)
    if config_path is not None:
        found.update(_from_file(config_path))
    found.update(_from_environ(environ))
    found.update(_from_options(options))
    return found


def _from_options(options: Mapping[str, object]) -> dict[str, Any]:
    found = {}
    for name, value in options.items():
        if value is None or value == ():
            continue
        if name not in BY_NAME:
            raise SettingsError(f"--{name.replace('_', '-')} = {shown(value)}: there is no such option")
        found[name] = _parse(BY_NAME[name], BY_NAME[name].flag, value)
    return found


def _from_environ(environ: Mapping[str, str]) -> dict[str, Any]:
    by_variable = {option.variable: option for option in OPTIONS}
    found = {}
    for variable in sorted(environ):
        if not variable.startswith(PREFIX) or variable == CONFIG_VARIABLE:
            continue
        option = by_variable.get(variable)
        if option is None:
            raise SettingsError(
                f"{variable} = {shown(environ[variable])}: there is no such option; --help shows them all"
            )
        found[option.name] = _parse(option, variable, environ[variable])
    return found


def _from_file(path: str) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            table = tomllib.load(file)
    except OSError as error:
        raise SettingsError(f"--config = {path!r}: can not be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"--config = {path!r}: is no valid TOML: {error}") from error
    try:
        return {name: _from_table(name, value) for name, value in table.items()}
    except SettingsError as error:
        raise SettingsError(f"{error} (in {path})") from None


def _from_table(name: str, value: object) -> Any:
    if name == "topics":
        return _topics(value)
    if name in TOML_ONLY:
        if value not in ACCESS_WORDS:
            raise SettingsError(f"{name} = {shown(value)}: must be one of {', '.join(ACCESS_WORDS)}")
        return value
    option = BY_NAME.get(name)
    if option is None:
        raise SettingsError(
            f"{name} = {shown(value)}: there is no such key; there are the options (--help), [topics.…], "
            f"{' and '.join(TOML_ONLY[1:])}"
        )
    if isinstance(value, str) and (option.is_number or option.is_switch or option.is_list):
        raise _wrong(option, name, value)  # TOML has types of its own for these
    return _parse(option, name, value)


def _topics(table: object) -> dict[str, TopicRule]:
    try:
        return parse_topics(table)
    except ValueError as error:
        raise SettingsError(str(error)) from None


def _parse(option: Option, key: str, value: object) -> Any:
    try:
        parsed = option.parse(value)
    except ValueError:
        raise _wrong(option, key, value) from None
    if option.name == "app":
        _check_app(key, parsed)
    if option.name == "allow_origin":
        return tuple(_check_origin(key, origin) for origin in parsed)
    if option.name == "redis_url":
        _check_redis_url(key, parsed)
    if option.name == "federate":
        _check_patterns(key, parsed)
    return parsed


def _wrong(option: Option, key: str, value: object) -> SettingsError:
    return SettingsError(f"{key} = {shown(value)}: must be {option.allowed}")


def _check_app(key: str, value: str) -> None:
    module, colon, attribute = value.partition(":")
    if colon and all(part.isidentifier() for part in [*module.split("."), *attribute.split(".")]):
        return
    raise SettingsError(f"{key} = {shown(value)}: must be module:attribute, like chat.main:app")


def _check_origin(key: str, value: str) -> str:
    try:
        check_allowed_origin(value)
    except ValueError as error:
        raise SettingsError(f"{key} = {error}") from None
    return value.lower()


def _check_redis_url(key: str, value: str) -> None:
    from ipc.redis_link import SCHEMES, redacted  # only where Redis is wanted

    try:
        parts = urlsplit(value)
        known = parts.scheme in SCHEMES and bool(parts.netloc or parts.path) and parts.port != 0
    except ValueError:  # a port that is none
        known = False
    if not known:
        # Not as it was given: it may hold a password.
        where = redacted(value) if "@" not in value.partition("//")[0] else "..."
        raise SettingsError(f"{key} = {shown(where)}: must be a redis://, rediss:// or unix:// address")


def _check_patterns(key: str, patterns: tuple[str, ...]) -> None:
    for pattern in patterns:
        try:
            check_pattern(pattern)
        except InvalidTopic as error:
            raise SettingsError(f"{key} = {shown(pattern)}: must be patterns of topics: {error}") from None


def _build(found: dict[str, Any], *, allow_anonymous: bool, bridge: bool = False) -> Settings:
    values = {option.name: found.get(option.name, option.default) for option in OPTIONS}
    values["allow_anonymous"] = allow_anonymous
    if values["workers"] is None:
        values["workers"] = min(len(os.sched_getaffinity(0)), MAX_WORKERS)
    rules = Rules(
        topics=found.get("topics", {}),
        client_broadcast=cast("Access | None", found.get("client_broadcast")),
        client_direct=cast("Access | None", found.get("client_direct")),
        anonymous=allow_anonymous,
        data_dir=os.path.abspath(values["data_dir"]) if values["data_dir"] else "",
        store_size=values["store_size"] or 0,
        federate=tuple(values["federate"]) if bridge and values["redis_url"] is not None else None,
    )
    return Settings(**values, rules=rules)


def _anonymous(found: Mapping[str, Any]) -> bool:
    """Whether clients without a token may connect; no silent default where strangers can reach the hub."""
    host = found.get("host", BY_NAME["host"].default)
    allowed: bool | None = found.get("allow_anonymous")
    loopback = is_loopback(host)
    if allowed or (loopback and allowed is not None):
        return bool(allowed)
    if loopback:
        return True
    raise SettingsError(
        f"--host = {shown(host)}: is not a loopback address, and there is no token check: whoever reaches it"
        " could read and publish everything; set --allow-anonymous (FLOCKWIRE_ALLOW_ANONYMOUS=1) if meant"
    )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``, an address or a name.

    Raises:
        SettingsError: the name is unknown.
    """
    try:
        addresses = [host] if _is_address(host) else _look_up(host)
    except (OSError, UnicodeError) as error:
        raise SettingsError(
            f"--host = {shown(host)}: must be an address or name of this machine: {error}"
        ) from None
    return all(_is_loopback_address(address) for address in addresses)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _look_up(host: str) -> list[str]:
    return [str(item[4][0]) for item in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]


def _is_loopback_address(text: str) -> bool:
    address = ipaddress.ip_address(text)
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


def _check_together(settings: Settings) -> None:
    """What no single value can be wrong about."""
    if settings.preload and settings.reload:
        raise SettingsError(
            "--preload = True: excludes --reload, as what was imported before the fork is not imported anew"
        )
    if settings.data_dir and settings.runtime_dir:
        if os.path.realpath(settings.data_dir) == os.path.realpath(settings.runtime_dir):
            raise SettingsError(
                f"--data-dir = {settings.data_dir!r}: must not be the runtime directory, which goes with the hub"
            )
    files = {"--ssl-certfile": settings.ssl_certfile, "--ssl-keyfile": settings.ssl_keyfile}
    for flag, path in files.items():
        if path is None:
            if any(files.values()):
                raise SettingsError(
                    f"{flag} = None: must be a PEM file when the other one of the two is given"
                )
        elif not os.path.isfile(path) or not os.access(path, os.R_OK):
            raise SettingsError(f"{flag} = {path!r}: must be a PEM file that can be read")
    if settings.ssl_certfile:
        _check_certificate(settings.ssl_certfile, settings.ssl_keyfile)


def _check_certificate(certificate: str, key: str | None) -> None:
    import ssl  # only who serves TLS pays for it

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
    except (OSError, ValueError) as error:
        why = getattr(error, "reason", None) or error
        raise SettingsError(
            f"--ssl-certfile = {certificate!r}: must be a PEM certificate that the unencrypted key in "
            f"--ssl-keyfile = {key!r} belongs to: {why}"
        ) from error
