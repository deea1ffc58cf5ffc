"""What an operator does with jobs, without a worker: find, explain, pause, cancel, retry, rerun, discard, delete."""
