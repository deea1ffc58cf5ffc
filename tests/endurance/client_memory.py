"""What a client of a great many results keeps of them."""

import json

from tests.endurance.harness import Figures, Run, main


def client_memory(run: Run, *, jobs: int = 100_000, waits: int = 10_000, together: int = 100) -> Figures:
    """Measure a process that sends `jobs` whose results are stored and asks for none, and those that wait.

    One waits for `waits` results, `together` at a time; one twice for all of the same number at once. `early` and
    `late` are what they held, in MB, after a fifth of their jobs (the last one: after the first half) and at the end,
    all results dropped. A worker (-c 2) runs the jobs meanwhile. `stored` are the results in our table.
    """
    run.start_ready()
    figures: Figures = {}
    for name, count, at_once in (("forgets", jobs, 0), ("waits", waits, together), ("all_at_once", 2 * waits, waits)):
        samples = _measure(run, name, count, at_once)
        figures |= {f"{name}_early": samples[len(samples) // 5], f"{name}_late": samples[-1]}
    run.finish()
    stored = sum(job.status == "SUCCESS" for job in run.rows().values())
    return {**run.figures(), "stored": stored, **figures}


def _measure(run: Run, name: str, count: int, together: int) -> list[float]:
    file = run.directory / f"{name}.json"
    run.client(count, file, together)
    run.expect(f"the client that {name} is done", file.exists)
    samples: list[float] = json.loads(file.read_text())
    return samples


if __name__ == "__main__":
    main(client_memory)
