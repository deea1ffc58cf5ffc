"""Figures for Prometheus, taken from the tables: no events, no losses, right after restarts. Needs ``[metrics]``."""

from kathikon_celery.metrics.collecting import Collector
from kathikon_celery.metrics.serving import exposition

__all__ = ["Collector", "exposition"]
