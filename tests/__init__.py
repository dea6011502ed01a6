"""The tests, in the folders of the package that they test."""

import pytest

pytest.register_assert_rewrite("tests.tools")  # a failing assertion there shows its values, too
