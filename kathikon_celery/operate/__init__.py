"""What an operator does with jobs, without a worker: find, explain, cancel, retry, discard."""
