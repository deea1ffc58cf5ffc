"""A pool whose processes are started anew, not forked, runs two jobs; for `test_ahead.py`."""

from __future__ import annotations

import sys
from pathlib import Path

from billiard import set_start_method

from tests.integration.test_ahead import Pool

if __name__ == "__main__":
    set_start_method("spawn", force=True)
    pool = Pool(Path(sys.argv[1]), processes=1)
    pool.begin("first")
    pool.send_behind("second")
    pool.let_go("first", "second")
    pool.until(lambda: len(pool.ended) == 2, "both ended")
    print(pool.begun())
    pool.close()
