"""What Celery workers do when they are killed, stopped, cut off or kept busy for long: figures for any broker.

    python -m tests.endurance.kill_workers --broker amqp://guest:guest@127.0.0.1//

Each module is one scenario and takes ``--help``; its last two lines of output are the figures, as JSON and in words.
`test_small` runs them all at small scale.
"""
