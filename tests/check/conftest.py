"""A sound project for each test to spoil."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.check.project import Project


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)
