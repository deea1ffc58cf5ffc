"""The thread that claims jobs and writes their ends, and what it hands them to."""
