"""How a task becomes a row: what the row says, and which transaction writes it."""
