"""The environment variables by which a run speaks to its processes."""

SYSTEM, FOLDER = "BENCHMARKS_SYSTEM", "BENCHMARKS_FOLDER"
