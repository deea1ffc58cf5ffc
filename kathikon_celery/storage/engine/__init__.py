"""Connections, transactions, and statements that are run often."""
