from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.portfwd.ninep.site import Site


@pytest.fixture
def site() -> Iterator[Site]:
    made = Site()
    yield made
    made.close()
