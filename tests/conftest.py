"""What all tests share: shapes and types checked at every call, reproducible examples, seeded generators."""

from collections.abc import Iterator

import hypothesis
import jaxtyping
import pytest
import torch

# Must come before the first import of the library. Users never pay for these checks.
jaxtyping.install_import_hook("icl_lib", "beartype.beartype")

hypothesis.settings.register_profile("book", deadline=None, derandomize=True)
hypothesis.settings.load_profile("book")


@pytest.fixture
def generator() -> torch.Generator:
    """A generator in the same state in every test."""
    return torch.Generator().manual_seed(20260101)


@pytest.fixture
def untyped() -> Iterator[None]:
    """Switch the checks of shapes and types off, as they are for users, to see the library's own messages."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)
