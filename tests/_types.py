"""Short names of pytest's fixtures, for signatures."""

from __future__ import annotations

import pytest

Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch
