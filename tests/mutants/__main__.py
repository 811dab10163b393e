"""Runs the tests on mutants of the package, and lists the mutants that no test noticed.

    python -m tests.mutants [--workers 2] [PART OF A SLIP OR OF A FILE'S NAME]

Each mutation is applied to a copy of the tree. The tests of all chosen mutations also run once without any: a test that
fails anyway notices nothing. The exit code is 1 if a mutant survived, 2 if something could not be run.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Literal, NamedTuple

from tests.mutants.copies import run
from tests.mutants.mutation import Mutation
from tests.mutants.table import MUTATIONS

PASSED, FAILED = 0, 1  # pytest's exit codes; others say that it could not run the tests

Verdict = Literal["noticed", "SURVIVED", "passed", "ERROR"]


class Outcome(NamedTuple):
    verdict: Verdict
    what: str
    seconds: float
    output: str


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workers", type=int, default=2, help="mutants at a time")
    parser.add_argument("part", nargs="?", default="", help="of a slip or of a file's name; all mutations without it")
    options = parser.parse_args(arguments)
    chosen = [m for m in MUTATIONS if options.part in m.slip or options.part in m.file]
    complaints = [complaint for mutation in chosen for complaint in mutation.complaints()]
    if complaints or not chosen:
        print("\n".join(complaints or [f"No mutation has {options.part!r} in its slip or file."]))
        return 2
    started, outcomes = time.monotonic(), []
    with ThreadPoolExecutor(options.workers) as pool:
        jobs = [pool.submit(run_mutant, mutation) for mutation in chosen]
        jobs += [pool.submit(run_unchanged, tests, keyword) for tests, keyword in all_tests(chosen).items()]
        try:
            for job in as_completed(jobs):
                outcomes.append(job.result())
                print(f"{outcomes[-1].verdict:8} {outcomes[-1].seconds:4.0f} s  {outcomes[-1].what}", flush=True)
        finally:
            pool.shutdown(cancel_futures=True)
    return summary(outcomes, time.monotonic() - started)


def all_tests(chosen: Sequence[Mutation]) -> dict[str, str]:
    """The keyword that selects, in each file, what the mutations name; empty where one names the whole file."""
    keywords: dict[str, list[str]] = {}
    for mutation in chosen:
        keywords.setdefault(mutation.tests, []).append(mutation.keyword)
    return {
        tests: " or ".join(f"({word})" for word in dict.fromkeys(words)) if all(words) else ""
        for tests, words in keywords.items()
    }


def run_mutant(mutation: Mutation) -> Outcome:
    code, seconds, output = run(mutation.tests, mutation.keyword, mutation)
    verdict: Verdict = "noticed" if code == FAILED else "SURVIVED" if code == PASSED else "ERROR"
    named = [line for line in output.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    by = named[0].partition("::")[2] if named else mutation.keyword or "all"
    return Outcome(verdict, f"{mutation.file}: {mutation.slip} ({mutation.tests}: {by})", seconds, output)


def run_unchanged(tests: str, keyword: str) -> Outcome:
    code, seconds, output = run(tests, keyword, None)
    return Outcome("passed" if code == PASSED else "ERROR", f"{tests} without a mutation", seconds, output)


def summary(outcomes: Sequence[Outcome], seconds: float) -> int:
    """Print what needs looking at, and return the exit code."""
    errors = [outcome for outcome in outcomes if outcome.verdict == "ERROR"]
    survivors = [outcome for outcome in outcomes if outcome.verdict == "SURVIVED"]
    noticed = sum(outcome.verdict == "noticed" for outcome in outcomes)
    for outcome in errors:
        print(f"\nERROR {outcome.what}: the tests could not be run, or do not pass without a mutation.")
        print("\n".join(outcome.output.splitlines()[-30:]))
    if survivors:
        print("\nNothing noticed:")
        print("\n".join(f"  {outcome.what}" for outcome in survivors))
    print(f"\n{noticed} noticed, {len(survivors)} survived, {len(errors)} errors in {seconds:.0f} s.")
    return 2 if errors else 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
