"""What a Celery worker on Kathikon runs besides Celery's own parts."""
