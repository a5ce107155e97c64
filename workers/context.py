"""What this process was started with: the supervisor's settings, or those of the environment.

Asked by managers when they start; no message passes here.
"""

from __future__ import annotations

from workers.settings import Settings

_settings: Settings | None = None


def use_settings(settings: Settings) -> None:
    """From now on :func:`current_settings` returns these; a worker of the supervisor calls it once."""
    global _settings
    _settings = settings


def current_settings() -> Settings:
    """The supervisor's settings, else those of ``FLOCKWIRE_…`` variables and defaults.

    Raises:
        SettingsError: a variable is wrong.
    """
    return _settings if _settings is not None else Settings.from_environment()
