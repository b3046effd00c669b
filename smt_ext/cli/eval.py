"""``smt-ext eval``: lm-eval on the paper's sets, or on tasks of its own, with trained blocks loaded."""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._extras import require
from .._files import replace_file
from ..checkpoint.blocks import load_blocks, read_blocks_info
from ..errors import DataError, Interrupted
from ..hf.loading import load_base, load_model, load_tokenizer, resolve_model
from ..nn.patching import unpatch
from ..precision import training_dtype
from .eval_rows import SUITES, find_sets
from .program import make_output

__all__ = ["TASKS", "add_arguments", "evaluate", "model_digest", "run"]

# Task files of lm-eval: `lm_eval run --include_path <this folder> --tasks smt_math` with SMT_DATA set.
TASKS = Path(__file__).parent / "tasks"
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--suite", choices=tuple(SUITES), help="the paper's 8 or 6 sets")
    what.add_argument("--tasks", nargs="+", metavar="NAME", help="tasks that lm-eval has itself")
    parser.add_argument("--model", required=True, help="the base model: a folder or hub name")
    parser.add_argument("--blocks", help="trained blocks to load onto it")
    parser.add_argument("--data", help="folder of the paper's sets (default: $SMT_DATA)")
    parser.add_argument("--sets", nargs="+", metavar="NAME", help="only these sets of the suite")
    parser.add_argument("--limit", type=int, help="only so many rows of each set, the first ones")
    parser.add_argument("--output", default="smt-eval", help="folder of the results (smt-eval)")
    parser.add_argument(
        "--precision", choices=("auto", *_DTYPES),
        help="dtype that the model runs in (default: that of the blocks' base; without blocks auto: "
        "bfloat16 where the device computes it at full rate, else float32)",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--batch_size", type=int, default=16, help="prompts a batch (16)")
    parser.add_argument("--max_new_tokens", type=int, help="of a generated answer (256)")
    parser.add_argument(
        "--apply_chat_template", action="store_true", help="prompts in the model's chat format"
    )


def run(options: argparse.Namespace) -> None:
    """Evaluate, print lm-eval's table, and write ``<output>/<suite>-<digest>.json``.

    Answers are kept in ``<output>/answers-<digest>_rank0.db`` as they come, by lm-eval; the digest is
    that of the model's values, so that the same command goes on where it was stopped.

    Raises:
        DataError: bad arguments or rows, or lm-eval is absent.
        Interrupted: Ctrl-C; what was evaluated is kept.
    """
    require("smt-ext eval", "lm_eval")
    if options.limit is not None and options.limit < 1:
        raise DataError(f"--limit is {options.limit}, expected at least 1 row of each set")
    if options.suite is None and (options.sets or options.data):
        raise DataError("--sets and --data belong to --suite, which is not given")
    absent = []
    if options.suite is not None:  # before the model takes its time to load
        absent = find_sets(options.suite, options.data, options.sets)[1]
    root = Path(options.output)
    make_output(root)
    if options.threads:
        torch.set_num_threads(options.threads)
    name = resolve_model(options.model)
    model = _load(name, options)
    digest = model_digest(model)
    file = root / f"{options.suite or 'results'}-{digest[:12]}.json"
    try:
        results = evaluate(
            model,
            load_tokenizer(name),
            options.suite or options.tasks,
            options.data,
            sets=options.sets,
            limit=options.limit,
            batch_size=options.batch_size,
            cache=root / f"answers-{digest[:12]}",
            max_new_tokens=options.max_new_tokens,
            apply_chat_template=options.apply_chat_template,
            log_samples=False,
        )
    except KeyboardInterrupt:
        raise Interrupted(
            f"stopped; the answers so far are in {str(root)!r}. The same command goes on from there."
        ) from None
    if not results:
        return  # another process has them
    from lm_eval.utils import handle_non_serializable, make_table

    results["smt_ext"] = {"model": options.model, "blocks": options.blocks, "digest": digest}
    with replace_file(file) as temporary:
        temporary.write_text(
            json.dumps(results, indent=1, default=handle_non_serializable) + "\n", encoding="utf-8"
        )
    print(make_table(results))
    if options.limit is not None:
        print(f"the first {options.limit:,} rows of each set alone")
    if absent:
        print(f"absent from the data folder: {', '.join(one.name for one in absent)}")
    print(f"written to {file}")


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    tasks: str | Sequence[str],
    data: str | None = None,
    *,
    sets: Sequence[str] | None = None,
    limit: int | None = None,
    samples: dict[str, list[int]] | None = None,
    batch_size: int = 16,
    cache: Path | None = None,
    max_new_tokens: int | None = None,
    apply_chat_template: bool = False,
    autocast: torch.dtype | None = None,
    log_samples: bool = True,
) -> dict[str, Any]:
    """lm-eval's ``simple_evaluate`` of a loaded model on a suite or on tasks that lm-eval has.

    Args:
        model: a causal language model of transformers, on its device.
        tokenizer: its tokenizer.
        tasks: ``commonsense`` or ``math``, whose average is a group's; or names of lm-eval's tasks.
        data: folder of a suite's sets; default ``SMT_DATA``.
        sets: only these of the suite.
        limit: only so many rows of each set, the first ones.
        samples: task -> indices of the rows, instead of ``limit``.
        batch_size: prompts a batch.
        cache: beginning of the name of a file that keeps the answers; answers there are used, so
            that it must be this model's own.
        max_new_tokens: of a generated answer; default the task's.
        apply_chat_template: prompts in the model's chat format.
        autocast: dtype of mixed precision.
        log_samples: with the rows and answers among the results.

    Returns:
        lm-eval's results, on a process other than the first an empty dictionary.

    Raises:
        DataError: a bad row or an absent set; names file and line.
    """
    # lm-eval says at length that the model is loaded already.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    import lm_eval
    from lm_eval.api.group import Group
    from lm_eval.config.group import GroupConfig
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    chosen: list[Any]
    if isinstance(tasks, str):
        manager = TaskManager(
            include_path=str(TASKS), include_defaults=False, metadata={"data": data}
        )
        names = [one.task for one in find_sets(tasks, data, sets)[0]]
        # Unweighted, as in the paper.
        average = {"metric": "acc", "weight_by_size": False}
        group = Group.from_config(GroupConfig(tasks, aggregate_metric_list=[average]))
        for task in manager.load(names)["tasks"].values():
            group.add(task)
        chosen = [group]
    else:
        manager, chosen = TaskManager(), list(tasks)
        if unknown := [task for task in tasks if task not in manager.all_tasks]:
            raise DataError(f"lm-eval has no task {unknown[0]!r}; `lm_eval ls tasks` lists them")
    lm = HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=batch_size,
        mixed_precision_dtype=autocast,
    )
    return (
        lm_eval.simple_evaluate(
            model=lm,
            tasks=chosen,
            task_manager=manager,
            limit=limit,
            samples=samples,
            use_cache=str(cache) if cache else None,
            gen_kwargs={"max_gen_toks": max_new_tokens} if max_new_tokens else None,
            apply_chat_template=apply_chat_template,
            log_samples=log_samples,
        )
        or {}
    )


def model_digest(model: nn.Module) -> str:
    """A digest of all parameter and buffer values of a model, whatever device they are on.

    Two tensors that differ only in the order of their entries have the same digest.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        facts = (name, tuple(tensor.shape), str(tensor.dtype), _sum_of_bits(tensor))
        digest.update(repr(facts).encode())
    return digest.hexdigest()


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _sum_of_bits(tensor: Tensor) -> int:
    """Sum of a tensor's values taken as whole numbers, modulo 2^64: one pass on its own device."""
    bits = tensor.detach().contiguous().view(_INTEGERS[tensor.element_size()])
    return int(bits.sum(dtype=torch.int64))


def _load(name: str, options: argparse.Namespace) -> nn.Module:
    """The plain model on its device, trained blocks merged into it where given."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wanted = _DTYPES.get(options.precision)
    if options.precision == "auto" or (wanted is None and options.blocks is None):
        wanted = training_dtype(device)
    if options.blocks is None:
        assert wanted is not None
        return load_model(name, wanted).to(device)
    info = read_blocks_info(options.blocks)
    model = load_blocks(load_base(name, info, device), options.blocks)
    if "quantization" in info["metadata"]:
        return model.eval()  # its weights cannot take the blocks
    return unpatch(model).to(device=device, dtype=wanted)
