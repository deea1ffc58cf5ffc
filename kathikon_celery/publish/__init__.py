"""How a task becomes a row: what it says in the table, and where its publication goes."""
