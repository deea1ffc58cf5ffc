"""Results: written with the end of a task, read and waited for by its callers."""
