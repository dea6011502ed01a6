"""Helpers that several tests share, one module per subject; fixtures are in tests/conftest.py."""
