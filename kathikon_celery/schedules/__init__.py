"""Schedules: when a task is sent again and again, by the workers themselves."""
