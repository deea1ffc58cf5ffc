"""Processes as nodes: the row and lease of this process, and the return of the jobs that dead nodes held."""
