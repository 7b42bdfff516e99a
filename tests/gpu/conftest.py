"""The tiny world of the integration tests, on a GPU."""

from tests.integration.conftest import _environment, dihal, root, session_cache

__all__ = ["_environment", "dihal", "root", "session_cache"]
