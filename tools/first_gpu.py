"""A first day on a GPU: build, check, measure; one JSON record (make first-gpu).

    python3 tools/first_gpu.py                         everything, 25 minutes at most
    python3 tools/first_gpu.py --minutes 9 --resume    what is left, in portions
    python3 tools/first_gpu.py --parts kernels step    these alone
    python3 tools/first_gpu.py --dry-run               without a GPU: what works without one
    python3 tools/first_gpu.py --carry build/googletest
                                                       GoogleTest's sources, for a machine without

Not yet run on a GPU. Needs no network and no virtual environment: the python3 that runs it has torch
(a CUDA build), transformers, peft, pytest, hypothesis, setuptools, cmake, ninja; nvcc is on PATH, in
CUDA_HOME or in /usr/local/cuda; GoogleTest is installed or its sources lie in build/googletest.

Each part has a time limit. A part that fails or runs out of time is recorded with the end of its
output, and the rest goes on; the record is written anew after each. The exit status is 0 if all parts
went well, 1 if some did not, 2 if there is no GPU.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "first_gpu"
GOOGLETEST = ROOT / "build" / "googletest"
RUN = ["sh", "tests/cpp/gpu/run.sh"]
TAIL = 6000  # characters of output kept a part
NO_GPU = 2
DEFAULT_DRY_ARCH = "90"
# Cases that reach every kernel, engine and way out, in the time that compute-sanitizer leaves.
SHORT_LIST = (
    "BlockGradTest/0.EqualsTheFormula",
    "BlockGradTest/4.EqualsTheFormula",
    "BlockGradTest/0.SplitsTokensWhereBlocksAreFew",
    "BlockGradTest/0.TakesSeveralBlocksAtOnce",
    "BlockGradTest/1.TakesAnyAddressOfTheGradient",
    "BlockGradTf32.EqualsTheFormulaOnRoundedOperands",
    "BlockScoreTest/*.OfTheFactorsOfAGradient",
    "BlockScoreTest/1.OfAGradient",
    "GatherTest/0.*OfEveryShapeAndLayout",
    "AdamWTest/*.FollowsTheFormula",
    "AdamW.HundredsOfLayers",
    "GradNormTest/*.OfSeveralGradients",
)


@dataclass(frozen=True)
class Part:
    """One thing to do.

    Attributes:
        command, dry: run in the repository's root, with a GPU and without one.
        limit: seconds.
        records: names of benchmark records that it leaves, without ".json".
        beside: runs at the same time as the part before it; for compilers.
    """

    name: str
    limit: float
    command: list[str]
    dry: list[str]
    records: tuple[str, ...] = ()
    beside: bool = False


def parts_of(arch: str) -> list[Part]:
    """In the order of what to know first."""
    python = [sys.executable]
    pytest = [*python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    gpu = [*pytest, "--gpu"]
    collect = [*pytest, "--collect-only"]
    kept = str(WORK / "dry")
    shown = [*python, "-c", FACTS]
    build = [*python, "setup.py", "build_ext"]
    law, graphs = "tests/gpu/test_gpu_memory.py", "tests/gpu/test_gpu_graphs.py"
    others = [f"--ignore={law}", f"--ignore={graphs}", "tests/gpu", "tests/ops"]
    step = [*python, "benchmarks/step.py", "--workload"]
    gtest = ":".join(SHORT_LIST)
    return [
        Part("machine", 60, shown, shown),
        Part("extension", 420, [*build, "--inplace", "--force"],
             [*build, "--build-lib", kept, "--build-temp", f"{kept}/objects"]),
        Part("checks", 420, [*RUN, "--build"], [*RUN, "--build"], beside=True),
        Part("kernel checks", 240, RUN, [*RUN, "--list"]),
        Part("python tests", 240, [*gpu, *others], [*collect, *others]),
        Part("graphs", 90, [*gpu, graphs], [*collect, graphs]),
        Part("memory laws", 90, [*gpu, law], [*collect, law]),
        Part("kernels", 240, [*python, "benchmarks/kernels.py", "--device", "cuda"],
             [*python, "benchmarks/kernels.py", "--quick"], ("kernels_cuda", "kernels")),
        Part("step", 480, [*step, "cuda-8b"],
             [*step, "quick", "--steps", "2", "--peers", "SMT 0.84 % qkv"],
             ("step_cuda-8b_bf16", "step_quick_bf16")),
        Part("sanitizer", 300, [*RUN, "--sanitize", gtest], [*RUN, "--list", gtest]),
    ]  # fmt: skip


FACTS = """
import subprocess, torch
from importlib.metadata import version
print("torch", torch.__version__, "CUDA", torch.version.cuda)
for name in ("transformers", "peft", "numpy", "pytest", "hypothesis", "ninja", "setuptools"):
    print(name, version(name))
for i in range(torch.cuda.device_count()):
    print(torch.cuda.get_device_properties(i))
if torch.cuda.is_available():
    print(subprocess.run(["nvidia-smi"], capture_output=True, text=True).stdout)
"""


def why_no_gpu() -> str:
    """What keeps this machine from a first day; "" if nothing does."""
    if importlib.util.find_spec("torch") is None:
        return f"no torch for {sys.executable}"
    import torch

    if torch.version.cuda is None:
        return f"no GPU: torch {torch.__version__} is a build without CUDA"
    if not torch.cuda.is_available():
        return "no GPU: torch finds no CUDA device"
    return ""


def arch_here() -> str:
    import torch

    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}"


def environment(arch: str) -> dict[str, str]:
    """For all parts: the tools of this Python and of CUDA, this tree's package, this GPU alone."""
    toolkit = Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda")
    folders = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    if shutil.which("nvcc") is None:
        folders.append(str(toolkit / "bin"))
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PATH": os.pathsep.join(folders),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
        "SMT_EXT_CUDA": "1",
        "SMT_EXT_CUDA_ARCHS": arch,
        "SMT_RECORDS": str(WORK / "records"),
        "GTEST_BRIEF": "1",
        "HF_HUB_OFFLINE": "1",
    }


def run_part(
    part: Part, command: Sequence[str], limit: float, env: dict[str, str]
) -> dict[str, Any]:
    """The part's entry in the record."""
    log = WORK / f"{part.name.replace(' ', '_')}.log"
    for name in part.records:  # none of an earlier run
        (WORK / "records" / f"{name}.json").unlink(missing_ok=True)
    begin = time.monotonic()
    with log.open("w") as output:
        try:
            process = subprocess.Popen(
                command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            return {"name": part.name, "status": "failed", "output": str(error)}
        try:
            code = process.wait(limit)
            status = "ok" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # and what it started
            code, status = process.wait(), "out of time"
    entry = {
        "name": part.name,
        "status": status,
        "exit status": code,
        "seconds": round(time.monotonic() - begin, 1),
        "limit": round(limit),
        "command": list(command),
        "output": log.read_text(errors="replace")[-TAIL:],
    }
    for name in part.records:
        path = WORK / "records" / f"{name}.json"
        if path.exists():
            found = json.loads(path.read_text())
            entry["results"] = found
            if status == "ok" and any("failed" in row for row in found["rows"]):
                entry["status"] = "failed"
    return entry


def groups(parts: Sequence[Part]) -> Iterator[list[Part]]:
    """Parts that run at the same time."""
    group: list[Part] = []
    for part in parts:
        if group and not part.beside:
            yield group
            group = []
        group.append(part)
    if group:
        yield group


def run_all(
    parts: Sequence[Part], record: dict[str, Any], target: Path, *, dry: bool, minutes: float,
    env: dict[str, str],
) -> None:  # fmt: skip
    """Adds an entry a part to the record and writes it after each group."""
    end = time.monotonic() + 60 * minutes
    (WORK / "records").mkdir(parents=True, exist_ok=True)
    for group in groups(parts):
        left = end - time.monotonic()

        def run(part: Part, left: float = left) -> dict[str, Any]:
            print(f"{part.name} ...", flush=True)
            if left < 5:
                return {"name": part.name, "status": "not run", "output": "the time was used up"}
            return run_part(part, part.dry if dry else part.command, min(part.limit, left), env)

        with ThreadPoolExecutor(len(group)) as pool:
            entries = list(pool.map(run, group))
        for entry in entries:
            record["parts"] = [e for e in record["parts"] if e["name"] != entry["name"]]
            record["parts"].append(entry)
            print(f"{entry['name']}: {entry['status']} {entry.get('seconds', '')}", flush=True)
        write(record, target)


def write(record: dict[str, Any], target: Path) -> None:
    text = json.dumps(record, indent=1) + "\n"
    for path in {WORK / "record.json", target}:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def tree_digest() -> str:
    """Of the sources: a record is gone on with on the same ones alone."""
    digest = hashlib.sha256()
    for folder in ("csrc", "smt_ext", "tests", "benchmarks", "tools"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cu", ".cuh", ".h", ".cpp", ".sh", ".txt"):
                digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    return done.stdout.strip() or "unknown"


def carry(folder: Path) -> None:
    """GoogleTest's sources in a folder: of Debian's package if it is installed, else downloaded."""
    target = folder / "usr" / "src" / "googletest"
    if (target / "CMakeLists.txt").exists():
        return
    installed = Path("/usr/src/googletest")
    if installed.is_dir():
        shutil.copytree(installed, target, dirs_exist_ok=True)
        return
    script = ROOT / "tests" / "cpp" / "get_googletest.sh"
    subprocess.run(["sh", str(script), str(folder)], check=True)
    if not (target / "CMakeLists.txt").exists():
        sys.exit(f"first_gpu: {folder} has no usr/src/googletest; install Debian's googletest")


def earlier(digest: str, dry: bool) -> dict[str, Any] | None:
    """The record to go on with."""
    path = WORK / "record.json"
    if not path.exists():
        return None
    record: dict[str, Any] = json.loads(path.read_text())
    same = record["sources"] == digest and record["dry run"] == dry
    return record if same else None


def main() -> None:
    names = [part.name for part in parts_of("")]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry-run", action="store_true", help="what works without a GPU")
    parser.add_argument("--arch", help="to compile for; default: this GPU's, 90 in a dry run")
    parser.add_argument("--parts", nargs="+", choices=names, metavar="PART", help=", ".join(names))
    parser.add_argument("--minutes", type=float, default=25.0, help="for everything")
    parser.add_argument(
        "--resume", action="store_true", help="keep what went well with these sources"
    )
    parser.add_argument("--record", type=Path, default=WORK / "record.json")
    parser.add_argument(
        "--carry", type=Path, metavar="FOLDER", help="put GoogleTest there, no more"
    )
    options = parser.parse_args()
    if options.carry:
        carry(options.carry)
        return
    if not options.dry_run and (reason := why_no_gpu()):
        print(f"first_gpu: {reason}. --dry-run does what works without one.", file=sys.stderr)
        sys.exit(NO_GPU)
    arch = options.arch or (DEFAULT_DRY_ARCH if options.dry_run else arch_here())
    digest = tree_digest()
    record = earlier(digest, options.dry_run) if options.resume else None
    record = record or {
        "what": "a first day on a GPU",
        "dry run": options.dry_run,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "sources": digest,
        "arch": arch,
        "parts": [],
    }
    done = {entry["name"] for entry in record["parts"] if entry["status"] == "ok"}
    wanted = options.parts or names
    parts = [p for p in parts_of(arch) if p.name in wanted and p.name not in done]
    run_all(parts, record, options.record, dry=options.dry_run, minutes=options.minutes,
            env=environment(arch))  # fmt: skip
    print(f"record: {options.record}")
    bad = [entry["name"] for entry in record["parts"] if entry["status"] != "ok"]
    if bad:
        sys.exit(f"first_gpu: not ok: {', '.join(bad)}")


if __name__ == "__main__":
    main()
