"""What runs beside the tasks of a worker, for as long as it lives."""
