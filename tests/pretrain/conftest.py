"""What the tests of pretraining share."""

import os

import pytest


@pytest.fixture(autouse=True)
def _no_power_cuts(monkeypatch):
    """Flushing hundreds of small files to the disk takes longer than all else; no test cuts the power."""
    monkeypatch.setattr(os, "fsync", lambda file: None)
