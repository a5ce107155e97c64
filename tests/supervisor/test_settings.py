"""Settings: precedence, and errors that name the key, the value and what is allowed."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest
import trustme

from ipc.rules import Rules
from workers.options import BY_NAME, OPTIONS, show_size
from workers.settings import Settings, SettingsError, find_hub, load_settings


def toml(tmp_path: Path, text: str) -> str:
    path = tmp_path / "hub.toml"
    path.write_text(text)
    return str(path)


def refused(
    options: dict[str, object] | None = None, environ: dict[str, str] | None = None, config: str | None = None
) -> str:
    with pytest.raises(SettingsError) as caught:
        load_settings(options or {}, environ or {}, config)
    words = str(caught.value)
    assert "\n" not in words
    return words


def test_defaults_are_those_of_the_contract() -> None:
    settings = load_settings({}, {})
    assert msgspec.structs.asdict(settings) == {
        "host": "127.0.0.1",
        "port": 8000,
        "workers": min(len(os.sched_getaffinity(0)), 64),
        "app": None,
        "preload": False,
        "reload": False,
        "runtime_dir": None,
        "allow_origin": (),
        "allow_anonymous": True,
        "max_message_size": 65536,
        "max_subscriptions": 128,
        "max_backlog": 1048576,
        "write_timeout": 10.0,
        "bus_backlog": 16777216,
        "ping_interval": 25.0,
        "ping_timeout": 10.0,
        "drain_timeout": 30.0,
        "worker_timeout": 10.0,
        "boot_timeout": 60.0,
        "data_dir": None,
        "store_size": None,
        "ssl_certfile": None,
        "ssl_keyfile": None,
        "log_level": "info",
        "log_format": "text",
        "access_log": False,
        "redis_url": None,
        "redis_prefix": "flockwire",
        "federate": ("#",),
        "rules": settings.rules,
    }


def test_every_option_is_a_setting_and_every_setting_an_option() -> None:
    assert {option.name for option in OPTIONS} | {"rules"} == set(Settings.__struct_fields__)


def test_precedence(tmp_path: Path) -> None:
    config = toml(tmp_path, "port = 1\nworkers = 2\nmax_backlog = '1KiB'\n")
    environ = {"FLOCKWIRE_PORT": "11", "FLOCKWIRE_WORKERS": "12", "OTHER": "x"}
    settings = load_settings({"port": "21", "workers": None}, environ, config)
    assert (settings.port, settings.workers, settings.max_backlog) == (21, 12, 1024)


def test_config_by_the_environment(tmp_path: Path) -> None:
    config = toml(tmp_path, "port = 4242\n")
    assert load_settings({}, {"FLOCKWIRE_CONFIG": config}).port == 4242
    assert find_hub({}, {"FLOCKWIRE_CONFIG": config, "FLOCKWIRE_RUNTIME_DIR": "/x"}) == (4242, "/x")


@pytest.mark.parametrize(
    ("text", "value"), [("65536", 65536), ("64KiB", 65536), ("1 MiB", 1048576), ("2mib", 2097152), ("7B", 7)]
)
def test_sizes(text: str, value: int) -> None:
    assert load_settings({"max_backlog": text}, {}).max_backlog == value


@pytest.mark.parametrize("word", ["true", "1", "yes", "on", "TRUE"])
def test_switches_in_the_environment(word: str) -> None:
    assert load_settings({}, {"FLOCKWIRE_ACCESS_LOG": word}).access_log
    assert not load_settings({"access_log": False}, {"FLOCKWIRE_ACCESS_LOG": word}).access_log


def test_lists(tmp_path: Path) -> None:
    wanted = ("https://a.example", "http://b.example:8080")
    config = toml(tmp_path, 'allow_origin = ["https://A.example", "http://b.example:8080"]')
    assert load_settings({}, {}, config).allow_origin == wanted
    assert load_settings({"allow_origin": wanted}, {}).allow_origin == wanted
    assert load_settings({}, {"FLOCKWIRE_ALLOW_ORIGIN": ", ".join(wanted)}).allow_origin == wanted


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("port", "65536", "0 to 65535"),
        ("port", "-1", "0 to 65535"),
        ("port", "http", "integer"),
        ("workers", "0", "1 to 64"),
        ("workers", "65", "1 to 64"),
        ("workers", "1.5", "integer"),
        ("max_backlog", "1MB", "64KiB"),
        ("max_backlog", "", "64KiB"),
        ("max_message_size", "1GiB", "64MiB"),
        ("worker_timeout", "nan", "seconds"),
        ("worker_timeout", "inf", "86400"),
        ("worker_timeout", "0.5", "from 1"),
        ("drain_timeout", "-1", "from 0"),
        ("log_level", "loud", "debug, info, warning, error, critical"),
        ("log_format", "xml", "text, json"),
        ("app", "module", "module:attribute"),
        ("app", "a b:c", "module:attribute"),
        ("app", "a:", "module:attribute"),
        ("allow_origin", "example.com", "https://"),
        ("allow_origin", "https://example.com/", "https://"),
        ("allow_origin", "https://example.com:99999", "https://"),
        ("host", "no-such-host.invalid", "address or name"),
    ],
)
def test_wrong_values_from_options_and_environment(name: str, value: str, allowed: str) -> None:
    option = BY_NAME[name]
    for key, words in (
        (option.flag, refused({name: value})),
        (option.variable if name != "host" else "--host", refused({}, {option.variable: value})),
    ):
        assert key in words
        assert repr(value) in words
        assert allowed in words


@pytest.mark.parametrize(
    ("text", "key", "allowed"),
    [
        ('port = "80"', "port = '80'", "0 to 65535"),
        ("port = true", "port = True", "0 to 65535"),
        ("workers = 2.0", "workers = 2.0", "1 to 64"),
        ("drain_timeout = '3'", "drain_timeout = '3'", "seconds"),
        ("reload = 1", "reload = 1", "true or false"),
        ('reload = "yes"', "reload = 'yes'", "true or false"),
        ('allow_origin = "https://a.example"', "allow_origin = 'https://a.example'", "list"),
        ("allow_origin = [1]", "allow_origin = [1]", "list"),
        ("app = 3", "app = 3", "text"),
        ("api_key = '/x'", "api_key = '/x'", "no such key"),
        ("data_dir = ''", "data_dir = ''", "not empty"),
        ("store_size = '9KiB'", "store_size = '9KiB'", "from 1MiB"),
        ("[nonsense]\nx = 1", "nonsense", "no such key"),
        ("client_broadcast = 'all'", "client_broadcast = 'all'", "nobody, authenticated, anyone"),
        ('[topics."a/#"]\npublish = "all"', 'topics."a/#".publish', "nobody, authenticated, anyone"),
        ('[topics."a/#"]\nvalidate = true', 'topics."a/#".validate', "slow_consumer"),
        ('[topics."a/#"]\nhistory_size = true', 'topics."a/#".history_size', "integer from 0 to"),
        ('[topics."a/#"]\nhistory_size = -1', 'topics."a/#".history_size', "integer from 0 to"),
        ('[topics."a/#"]\nhistory_ttl = "5"', 'topics."a/#".history_ttl', "seconds"),
        ('[topics."a/#"]\nhistory_ttl = nan', 'topics."a/#".history_ttl', "seconds"),
        ('[topics."a/#"]\npresence = 1', 'topics."a/#".presence', "true, false"),
        ('[topics."a/+"]\npublish = "nobody"', "'a/+'", "topic"),
        ("topics = 3", "topics = 3", "table"),
        ("port = ", "hub.toml", "TOML"),
    ],
)
def test_wrong_values_in_toml(tmp_path: Path, text: str, key: str, allowed: str) -> None:
    config = toml(tmp_path, text)
    words = refused(config=config)
    assert key in words
    assert allowed in words
    assert config in words


def test_config_that_is_not_there(tmp_path: Path) -> None:
    assert "No such file" in refused(config=str(tmp_path / "none.toml"))


def test_unknown_names_are_refused_from_everywhere() -> None:
    assert "--api-key" in refused({"api_key": "x"})
    assert "FLOCKWIRE_API_KEY" in refused({}, {"FLOCKWIRE_API_KEY": "x"})
    assert "FLOCKWIRE_TOPICS" in refused({}, {"FLOCKWIRE_TOPICS": "x"})


def test_rules(tmp_path: Path) -> None:
    config = toml(
        tmp_path,
        'client_broadcast = "nobody"\n[topics."chat/#"]\npublish = "nobody"\nslow_consumer = "latest"\n',
    )
    rules = load_settings({}, {}, config).rules
    assert not rules.may_publish("chat/1", False)
    assert rules.may_subscribe("chat/#", False)
    assert rules.slow_consumer("chat/1") == "latest"
    assert not rules.may_broadcast(True)
    assert rules.may_direct(False)


def test_what_a_bridge_carries_is_a_rule_of_a_hub_that_has_one(tmp_path: Path) -> None:
    config = toml(tmp_path, 'federate = ["chat/#", "news"]\n[topics."chat/secret/#"]\nfederate = false\n')
    assert load_settings({}, {}, config).rules.federate is None
    rules = load_settings({"redis_url": "redis://localhost"}, {}, config).rules
    assert [t for t in ("chat/1", "news", "news/1", "chat/secret/1", "$x") if rules.federates(t)] == [
        "chat/1",
        "news",
    ]
    assert Rules.decode(rules.encode()) == rules
    assert Settings.from_environment({"FLOCKWIRE_REDIS_URL": "redis://localhost"}).rules.federate is None


@pytest.mark.parametrize("url", ["http://x", "redis", "redis://", "redis://x:port", "", "s3cr3t@x"])
def test_an_address_that_is_none_of_redis_is_refused(url: str) -> None:
    words = refused({"redis_url": url})
    assert words.startswith("--redis-url = ")
    assert "s3cr3t" not in words


def test_patterns_to_federate_are_checked() -> None:
    assert "a/#/b" in refused({"federate": ("ok", "a/#/b")})


def test_rules_default_to_authenticated_where_anonymous_clients_are_not_let_in() -> None:
    rules = load_settings({"allow_anonymous": False}, {}).rules
    assert not rules.may_publish("a", False)
    assert rules.may_publish("a", True)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7"])
def test_a_host_that_strangers_reach_needs_a_word(host: str) -> None:
    for more in ({}, {"allow_anonymous": False}):
        words = refused({"host": host, **more})
        assert "--allow-anonymous" in words
        assert host in words
    assert load_settings({"host": host, "allow_anonymous": True}, {}).allow_anonymous


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.10", "::1", "localhost", "::ffff:127.0.0.1"])
def test_loopback_hosts_need_none(host: str) -> None:
    assert load_settings({"host": host}, {}).allow_anonymous


def test_tls_needs_both_files(tmp_path: Path) -> None:
    pem = tmp_path / "x.pem"
    pem.touch()
    assert "--ssl-keyfile" in refused({"ssl_certfile": str(pem)})
    assert "--ssl-certfile" in refused({"ssl_keyfile": str(pem)})
    assert "can be read" in refused({"ssl_certfile": str(pem), "ssl_keyfile": str(tmp_path / "none")})
    assert "must be a PEM certificate" in refused({"ssl_certfile": str(pem), "ssl_keyfile": str(pem)})
    issued = trustme.CA().issue_cert("127.0.0.1")
    issued.private_key_and_cert_chain_pem.write_to_path(str(pem))
    assert load_settings({"ssl_certfile": str(pem), "ssl_keyfile": str(pem)}, {}).is_tls
    other = tmp_path / "other.pem"
    trustme.CA().issue_cert("127.0.0.1").private_key_pem.write_to_path(str(other))
    assert "belongs to" in refused({"ssl_certfile": str(pem), "ssl_keyfile": str(other)})


def test_preload_excludes_reload() -> None:
    assert "--reload" in refused({"preload": True, "reload": True})


def test_from_environment_for_a_foreign_server() -> None:
    settings = Settings.from_environment({"FLOCKWIRE_HOST": "0.0.0.0", "FLOCKWIRE_MAX_BACKLOG": "2KiB"})
    assert settings.allow_anonymous
    assert settings.rules.anonymous
    assert settings.max_backlog == 2048
    with pytest.raises(SettingsError, match="FLOCKWIRE_MAX_BACKLOG"):
        Settings.from_environment({"FLOCKWIRE_MAX_BACKLOG": "much"})


def test_sizes_in_words() -> None:
    assert [show_size(size) for size in (1, 1024, 1536, 1048576, 16777216)] == [
        "1",
        "1KiB",
        "1536",
        "1MiB",
        "16MiB",
    ]
