"""Fixtures that several tests share."""

from pathlib import Path

import pytest

from dvt import models
from dvt.tests.miniature import SMALL_MODELS, write_imagenet


@pytest.fixture(scope="session")
def imagenet(tmp_path_factory) -> Path:
    """A miniature ImageNet of six classes: 24 images to train on, 12 to evaluate on."""
    return write_imagenet(tmp_path_factory.mktemp("imagenet"))


@pytest.fixture
def small_models(monkeypatch) -> None:
    """Published names build networks with few channels, in this process."""
    for name, entry in SMALL_MODELS.items():
        monkeypatch.setitem(models.MODELS, name, entry)
