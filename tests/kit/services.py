"""Services that tests marked ``services`` need, and may not find."""

import os
from typing import NoReturn

import pytest


def unavailable(service: str, reason: str) -> NoReturn:
    """Skip the test, or fail it where $PAM_SERVICES lists this service as installed for it (.ci/run)."""
    if service in os.environ.get("PAM_SERVICES", "").split():
        pytest.fail(f"{service} was installed, but: {reason}")
    pytest.skip(reason)
