"""Tools for tests of an app on Kathikon. See ``docs/test-your-app.md``.

- `kathikon_celery.testing.plugin`: fixtures, which pytest finds wherever this package is installed
- `kathikon_celery.testing.isolation`: an app of your own on a database of its own
- `kathikon_celery.testing.doubles`: a double of the storage
- `kathikon_celery.testing.components`: broker, backend and worker for the ``celery_setup`` of pytest-celery, no Docker

Nothing here changes a setting for longer than a test.
"""
