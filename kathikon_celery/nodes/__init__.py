"""Processes as nodes: this one's own row and lease, and the rescue of what dead ones held."""
