"""Replaced databases on the pools that the suite leaves out: ``pytest tests/endurance/lost_databases.py``, a minute."""

from pathlib import Path

import pytest

from tests.integration.test_failover import POOLS, test_a_database_that_is_replaced_by_an_empty_one


@pytest.mark.parametrize("pool", [pool for pool in POOLS if pool != "prefork"])
def test_on_another_pool(postgresql_url: str, tmp_path: Path, pool: str) -> None:
    test_a_database_that_is_replaced_by_an_empty_one(postgresql_url, tmp_path, pool)
