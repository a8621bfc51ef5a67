"""Servers of these tests have every receipt in the database once the provider is answered, however slow the machine is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from aftertouch.ingest import intake


@pytest.fixture(scope="module", autouse=True)
def _store_before_answering() -> Iterator[None]:
    """Otherwise a provider that has waited some seconds is answered from the spool, and its receipts are counted later."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(intake, "ANSWER_SECONDS", 600.0)
        yield
