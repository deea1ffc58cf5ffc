"""The shops of ``examples/``, each in a folder of its own with a database of its own, as a stranger would run them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from sqlalchemy import create_engine, text

from tests.support.workers import ROOT, WorkerProcess

SHOPS = ("django_shop", "fastapi_shop")
#: Shop -> the tables of orders, receipts, moves and stock.
TABLES = {
    "django_shop": ("shop_order", "shop_receipt", "shop_move", "shop_stock"),
    "fastapi_shop": ("orders", "receipts", "moves", "stock"),
}
STOCK = 100_000


class Shop:
    """A shop of the *kind* in a database; *environment* is added to that of its processes."""

    def __init__(
        self, kind: str, database_url: str, directory: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self.kind, self.database_url, self.directory = kind, database_url, directory
        self.folder = ROOT / "examples" / kind
        paths = (str(self.folder), str(ROOT))
        self.environment = {"DATABASE_URL": database_url, "PYTHONPATH": os.pathsep.join(paths), **(environment or {})}

    def command(self, name: str, *arguments: str) -> list[str]:
        """Return the command line of the shop's command *name*, such as ``take_orders``."""
        if self.kind == "django_shop":
            return [sys.executable, str(self.folder / "manage.py"), name, *arguments]
        return [sys.executable, "-m", f"shop.{name}", *arguments]

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        """Start a process of the shop; what it prints goes to ``shop.log``."""
        with (self.directory / "shop.log").open("ab") as log:
            return subprocess.Popen(
                command, cwd=self.directory, env=os.environ | self.environment, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip

    def producer(self, in_transaction: bool = True) -> list[str]:
        """Return the command line of an endless taker of orders, whose tasks may be sent after the commit."""
        if in_transaction:
            return self.command("take_orders", "1000000")
        return [sys.executable, "-m", "tests.endurance.delay_on_commit"]

    def create(self) -> None:
        """Create the shop's tables."""
        command = self.command("migrate" if self.kind == "django_shop" else "create_tables")
        if self.start(*command).wait(60):
            raise RuntimeError((self.directory / "shop.log").read_text(errors="replace")[-3000:])

    def worker(self, name: str, pool: str = "prefork", concurrency: int = 2) -> WorkerProcess:
        """Return a worker of the shop, not started yet."""
        module = "shop" if self.kind == "django_shop" else "shop.tasks"
        return WorkerProcess(
            directory=self.directory, app=module, name=name, pool=pool, concurrency=concurrency, env=self.environment
        )

    def orders(self) -> int:
        """Return how many orders are committed."""
        return self._query(f"SELECT count(*) FROM {TABLES[self.kind][0]}")[0][0]  # type: ignore[no-any-return]

    def books(self) -> dict[str, int]:
        """Count orders, and the receipts and moves that are missing, double or of no order; and check the stock."""
        orders, receipts, moves, stock = TABLES[self.kind]
        [(number, ordered)] = self._query(f"SELECT count(*), coalesce(sum(quantity), 0) FROM {orders}")
        [(left,)] = self._query(f"SELECT quantity FROM {stock}")
        figures = {"orders": number, "stock_wrong": int(STOCK - ordered - left)}
        for name, table in (("receipts", receipts), ("moves", moves)):
            [(sent, different)] = self._query(f"SELECT count(*), count(DISTINCT order_id) FROM {table}")
            [(right,)] = self._query(f"SELECT count(*) FROM {orders} WHERE id IN (SELECT order_id FROM {table})")
            figures |= {
                name: sent, f"{name}_lost": number - right, f"{name}_double": sent - different,
                f"{name}_of_nothing": different - right,
            }  # fmt: skip
        return figures

    def _query(self, statement: str) -> list[tuple[int, ...]]:
        engine = create_engine(self.database_url)
        try:
            with engine.connect() as connection:
                return [tuple(row) for row in connection.execute(text(statement))]
        finally:
            engine.dispose()
