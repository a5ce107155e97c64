"""For all tests: hypothesis without deadlines, since these machines are noisy."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("flockwire", deadline=None)
settings.load_profile("flockwire")
