"""Kathikon and other brokers, measured side by side on the reader's machine: ``python -m benchmarks``."""
