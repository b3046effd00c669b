"""The command line: run what a matrix still lacks, and make tables of what there is.

    python -m benchmarks.quality run benchmarks/quality/matrix.yaml --jobs 2
    python -m benchmarks.quality run benchmarks/quality/matrix.yaml --only methods --task math
    python -m benchmarks.quality run benchmarks/quality/matrix.yaml --dry-run
    python -m benchmarks.quality tables benchmarks/quality/matrix.yaml

Each trial is a process of its own, so that memory is measured from a clean start and a crash ends
one trial. A record appears when its trial is done; stopped by Ctrl-C, kill -9 or a power cut, the same
command goes on with the trials that have none. Learning rates are chosen on development rows,
never on the test sets: a trial is preceded by the development runs it depends on. ``--jobs 2`` runs two
trials at a time, each with its share of the processors: a model this small gains little from a second
thread.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from smt_ext.errors import DataError

from .matrix import TASKS, Choice, Matrix, Trial, Wanted, load_matrix
from .tasks import data_folder
from .trial import FORMAT, VERSION

__all__ = ["load_records", "main", "missing", "run_matrix"]

BENCHMARKS = Path(__file__).parents[1]
RECORDS = BENCHMARKS / "records" / "quality"
RESULTS = Path(__file__).parent / "results"
Records = dict[str, dict[str, Any]]
LEARNING_RATE = "learning rate"  # where a table's name stands, for development runs


def load_records(folder: Path) -> Records:
    """All records of a folder by id.

    Raises:
        DataError: a file that is no record; names it.
    """
    records = {}
    for path in sorted(folder.glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{str(path)!r} is no record: {error}") from None
        if not isinstance(record, dict) or (record.get("format"), record.get("version")) != (
            FORMAT, VERSION,
        ):  # fmt: skip
            raise DataError(f"{str(path)!r} is no {FORMAT} record of version {VERSION}")
        records[record["id"]] = record
    return records


def missing(matrix: Matrix, records: Mapping[str, Any], limit: int | None = None) -> list[Wanted]:
    """What has no record yet, in the order to run it: development runs ahead of what needs them.

    Args:
        limit: at most so many trials of the tables; their development runs do not count.
    """
    todo: dict[Trial, Wanted] = {}
    count = 0
    for wanted in matrix.wanted:
        if limit is not None and count >= limit:
            break
        resolved = matrix.resolve(wanted.trial, records)
        if (resolved is not None and resolved.id in records) or wanted.trial in todo:
            continue
        for dev in matrix.dev_trials(wanted.trial, records):
            if dev.id not in records:
                todo.setdefault(dev, Wanted(LEARNING_RATE, dev))
        todo[wanted.trial] = wanted
        count += 1
    return list(todo.values())


def expected_seconds(matrix: Matrix, trial: Trial, records: Mapping[str, Any]) -> float:
    """From records of the same kind of trial where there are any, else from the matrix's guesses."""
    alike = [
        record["seconds"]["all"]
        for record in records.values()
        if all(
            record["trial"][name] == getattr(trial, name)
            for name in ("task", "method", "split", "steps", "batch_size", "limit", "device")
        )
    ]
    if alike:
        return statistics.median(alike)
    steps = {"plan": trial.plan_batches or 0, "test": trial.steps, "dev": trial.steps}[trial.split]
    return matrix.fixed_seconds + steps * float(matrix.step_seconds.get(trial.method, 1.0))


def run_matrix(
    matrix: Matrix,
    folder: Path,
    data: Path,
    *,
    limit: int | None = None,
    threads: int | None = None,
    jobs: int = 1,
    progress: bool = True,
) -> int:
    """Run what is missing; returns how many trials failed or could not be run.

    Args:
        folder: of the records.
        limit: at most so many trials of the tables, and the development runs that they need.
        threads: of each trial; by default the processors are shared out among the jobs.
        jobs: trials that run at a time.

    Raises:
        DataError: no usable ``jobs``, or a file among the records that is none.
    """
    if jobs < 1:
        raise DataError(f"jobs is {jobs}, expected 1 or more")
    if threads is None and jobs > 1:
        threads = max(1, (os.cpu_count() or 1) // jobs)
    records = load_records(folder)
    asked = [w for w in missing(matrix, records, limit) if w.table != LEARNING_RATE]
    matrix = dataclasses.replace(matrix, wanted=tuple(asked))
    failed, tried = 0, set()
    running: dict[Future[str], tuple[Trial, Path, subprocess.Popen[str]]] = {}
    folder.mkdir(parents=True, exist_ok=True)
    with (
        ThreadPoolExecutor(jobs) as readers,
        tqdm(desc="trials", unit="trial", disable=not progress) as bar,
    ):
        try:
            while True:
                # Found anew each time: a development run may call for another beyond its grid.
                todo = [w for w in missing(matrix, records) if w.trial not in tried]
                bar.total = bar.n + len(running) + len(todo)
                ready = next((w for w in todo if matrix.resolve(w.trial, records)), None)
                if ready is not None and len(running) < jobs:
                    tried.add(ready.trial)
                    trial = matrix.resolve(ready.trial, records)
                    assert trial is not None
                    bar.set_postfix_str(f"{ready.table}: {trial.id}")
                    path = folder / f"{trial.id}.json"
                    process = _start(
                        _request(trial, matrix.choose(ready.trial, records), data, path, threads)
                    )
                    reader = readers.submit(_follow, process, trial, progress)
                    running[reader] = (trial, path, process)
                elif running:
                    for reader in wait(running, return_when=FIRST_COMPLETED).done:
                        trial, path, _ = running.pop(reader)
                        problem = reader.result()
                        if problem:
                            failed += 1
                            bar.write(f"{trial.id}: failed\n{problem}", file=sys.stderr)
                        else:
                            records[trial.id] = json.loads(path.read_text(encoding="utf-8"))
                        bar.update()
                else:
                    break
        finally:
            for _, _, process in running.values():
                process.kill()
        for wanted in todo:
            failed += 1
            bar.write(f"{wanted.trial.id}: not run, it has no learning rate: no development run "
                      "with a finite loss", file=sys.stderr)  # fmt: skip
            bar.update()
    return failed


def _request(
    trial: Trial, choice: Choice | None, data: Path, record: Path, threads: int | None
) -> dict[str, Any]:
    """What :mod:`.trial` is told."""
    return {
        "trial": dataclasses.asdict(trial),
        "data": str(data),
        "record": str(record),
        "threads": threads,
        "lr_choice": choice
        and {
            "dev_losses": [
                [lr, loss if loss < float("inf") else None] for lr, loss in choice.losses.items()
            ],
            "at_edge": choice.at_edge,
        },
    }


def _start(request: Mapping[str, Any]) -> subprocess.Popen[str]:
    environment = {"OMP_WAIT_POLICY": "passive", **os.environ}
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(BENCHMARKS.parent), os.environ.get("PYTHONPATH")])
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.quality.trial"], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
    )  # fmt: skip
    assert process.stdin is not None
    with process.stdin as stdin:
        json.dump(request, stdin)
    return process


def _follow(process: subprocess.Popen[str], trial: Trial, progress: bool) -> str:
    """Show how far a trial is until it ends; returns the end of its output if it failed, else ""."""
    assert process.stdout is not None
    last: deque[str] = deque(maxlen=25)
    with tqdm(total=trial.steps, leave=False, unit="step", disable=not progress) as bar:
        for line in process.stdout:
            words = line.split()
            if len(words) == 3 and words[0] == "step":
                bar.set_postfix_str(f"loss {words[2]}")
                bar.update()
            else:
                last.append(line)
                if words in (["preparing"], ["planning"], ["evaluating"]):
                    bar.set_description(words[0])
    code = process.wait()
    return "" if code == 0 else f"exit status {code}\n{''.join(last)}"


def print_todo(matrix: Matrix, records: Mapping[str, Any], limit: int | None) -> None:
    """What is missing, and about how long it takes."""
    todo = missing(matrix, records, limit)
    hours: dict[str, float] = {}
    for wanted in todo:
        seconds = expected_seconds(matrix, wanted.trial, records)
        hours[wanted.table] = hours.get(wanted.table, 0.0) + seconds / 3600
        lr = "lr to be chosen" if wanted.trial.needs_lr else f"lr {wanted.trial.lr}"
        print(f"{seconds:6.0f} s  {wanted.table:14}  {wanted.trial.id}  {lr}")
    for table, of_table in hours.items():
        count = sum(wanted.table == table for wanted in todo)
        print(f"{table:20} {count:4} trials  {of_table:6.2f} h")
    print(f"{'all that is missing':20} {len(todo):4} trials  {sum(hours.values()):6.2f} h")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.quality", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("run", "run the trials that have no record"),
        ("tables", "write Markdown tables and plots of the records"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("matrix", type=Path, help="the YAML file")
        command.add_argument("--records", type=Path, default=RECORDS)
        command.add_argument("--only", nargs="+", default=[], metavar="TABLE")
        command.add_argument("--task", nargs="+", default=[], choices=TASKS)
    run = commands.choices["run"]
    run.add_argument("--limit", type=int, help="at most so many trials (their development runs "
                     "come on top)")  # fmt: skip
    run.add_argument("--dry-run", action="store_true", help="list the trials and their time")
    run.add_argument("--jobs", type=int, default=1, help="trials that run at a time")
    run.add_argument("--threads", type=int, help="of each trial; by default the processors are "
                     "shared out among the jobs")  # fmt: skip
    run.add_argument("--quiet", action="store_true", help="no progress bars")
    commands.choices["tables"].add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    try:
        matrix = load_matrix(args.matrix, args.only, args.task)
        if args.command == "tables":
            from .tables import write_tables

            path = write_tables(matrix, load_records(args.records), args.output)
            print(f"wrote {path}")
            return 0
        if args.dry_run:
            print_todo(matrix, load_records(args.records), args.limit)
            return 0
        failed = run_matrix(
            matrix, args.records, data_folder(), limit=args.limit, threads=args.threads,
            jobs=args.jobs, progress=not args.quiet,
        )  # fmt: skip
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on with what has no record", file=sys.stderr)
        return 130
    return 1 if failed else 0
