"""Every change that writes a state is made by one module, and asks the state machine."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from sqlalchemy import make_url

import kathikon_celery.storage
from kathikon_celery.job import TERMINAL, State, sources
from kathikon_celery.storage import transitions
from kathikon_celery.storage.dialects import dialect_for

STORAGE = Path(kathikon_celery.storage.__file__).parent


def writes_a_state(tree: ast.AST) -> bool:
    """Whether ``state`` is given a value: in ``.values(…)``, in ``.of(…)``, or in a dictionary for them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            named = [key.value for key in node.keys if isinstance(key, ast.Constant)]
            if "state" in named and None not in node.keys:
                return True
        is_values = (
            isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("values", "of")
        )
        if is_values and any(keyword.arg == "state" for keyword in node.keywords):
            return True
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
            name = getattr(node.value, "id", "")
            if name == "changes" and isinstance(node.slice, ast.Constant) and node.slice.value == "state":
                return True
    return False


def test_one_module_writes_states() -> None:
    found = [
        path.relative_to(STORAGE).as_posix()
        for path in sorted(STORAGE.rglob("*.py"))
        if "migrations" not in path.parts and writes_a_state(ast.parse(path.read_text()))
    ]
    # reading.py says of a corrupt row that it is dead, to whoever reads it.
    assert found == ["reading.py", "transitions.py"]


@pytest.mark.parametrize("state", sorted(TERMINAL))
def test_an_end_frees_the_row(state: State) -> None:
    assert set(transitions.BRINGS[state]) == {"ended_at", "node_id"}


@pytest.mark.parametrize("state", [State.RUNNING, State.COMPLETED, State.DEAD, State.CANCELLED, State.DISCARDED])
def test_a_statement_asks_the_state_machine(state: State) -> None:
    change = transitions.started() if state is State.RUNNING else transitions.ended(state)
    url = make_url("sqlite:///no-file")
    assert dialect_for(url).name == url.get_dialect().name  # it says how a moment is written
    text = str(change.of().compile(dialect=url.get_dialect()(), compile_kwargs={"literal_binds": True}))
    allowed = text.partition(" IN (")[2].partition(")")[0]
    assert {one.strip("' ") for one in allowed.split(",")} == {str(one) for one in sources(state)}
