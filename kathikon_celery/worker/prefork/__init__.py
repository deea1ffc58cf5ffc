"""The prefork pool: Celery's, with fewer writes for each task, and a next job in the pipe of a busy process."""
