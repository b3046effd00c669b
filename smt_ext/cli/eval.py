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
from torch import nn

from .._files import replace_file
from ..checkpoint.base_digest import digest_of_config, digests_of_base
from ..checkpoint.blocks import load_blocks, read_blocks_info
from ..checkpoint.training_state import random_state, set_random_state
from ..errors import DataError, Interrupted
from ..hf.loading import load_base, load_model, load_tokenizer_of, resolve_model, revision_of
from ..hf.run_binding import digest_of_tokenizer
from ..hf.score_callback import evaluating
from ..nn.patching import smt_modules, unpatch
from ..precision import training_dtype
from ..quantization import stop_repacking
from .eval_rows import find_sets
from .program import make_output, template_of

__all__ = ["TASKS", "evaluate", "model_digest", "run"]

# Task files of lm-eval: `lm_eval run --include_path <this folder> --tasks smt_math` with SMT_DATA set.
TASKS = Path(__file__).parent / "tasks"
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def run(options: argparse.Namespace) -> None:
    """Evaluate, print lm-eval's table, and write ``<output>/<suite>-<digest>.json``.

    Answers are kept in ``<output>/answers-<digest>_rank0.db`` as they come, by lm-eval; that digest is
    of the model's values, so that the same command goes on where it was stopped.

    Raises:
        DataError: bad arguments or rows.
        Interrupted: Ctrl-C; what was evaluated is kept.
    """
    for name in ("limit", "batch_size", "max_new_tokens", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise DataError(f"--{name} is {value}, expected at least 1")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    of_suite = options.suite or options.sets or options.data
    if bool(of_suite) == bool(options.tasks) or (of_suite and not options.suite):
        raise DataError("expected --suite (with --data and --sets), or --tasks")
    if options.tasks and options.template is not None:
        raise DataError(
            "--template is of a suite's prompts: for --tasks pass --apply_chat_template"
        )
    if options.apply_chat_template and options.template not in (None, "chat"):
        raise DataError(f"--template is {options.template!r}: leave --apply_chat_template away")
    absent, template = [], "plain"
    if options.suite is not None:  # before the model takes its time to load
        template = _template(options)
        absent = find_sets(options.suite, options.data, options.sets)[1]
    root = Path(options.output)
    make_output(root)
    name = resolve_model(options.model)
    info = None if options.blocks is None else read_blocks_info(options.blocks)
    source = revision_of(name, options.model_revision, info)
    model = _load(name, source, info, options)
    tokenizer = load_tokenizer_of(options.blocks, name, **source)
    digest = _digest(
        model_digest(model), digest_of_tokenizer(tokenizer), digest_of_config(model.config)
    )
    gen = {"max_gen_toks": options.max_new_tokens} if options.max_new_tokens else None
    try:
        results = evaluate(
            model,
            tokenizer,
            options.suite or options.tasks,
            options.data,
            sets=options.sets,
            batch_size=options.batch_size,
            limit=options.limit,
            use_cache=str(root / f"answers-{digest}"),
            gen_kwargs=gen,
            template=template,
            apply_chat_template=options.apply_chat_template or template == "chat",
            log_samples=False,
        )
    except KeyboardInterrupt:
        raise Interrupted(
            f"stopped; the answers so far are in {str(root)!r}. The same command goes on from there."
        ) from None
    if not results:
        return  # another process has them
    from lm_eval.utils import handle_non_serializable, make_table

    results["smt_ext"] = {"model": options.model, "blocks": options.blocks, **source}
    results["smt_ext"]["template"] = template
    asked = [options.tasks, options.sets, options.limit, options.max_new_tokens, template]
    chosen = _digest(digest, *asked, options.apply_chat_template, options.data)
    file = root / f"{options.suite or 'results'}-{chosen}.json"
    with replace_file(file) as temporary:
        text = json.dumps(results, indent=1, default=handle_non_serializable)
        temporary.write_text(text + "\n", encoding="utf-8")
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
    batch_size: int = 16,
    autocast: torch.dtype | None = None,
    template: str = "plain",
    **settings: Any,
) -> dict[str, Any]:
    """lm-eval's ``simple_evaluate`` of a loaded model on a suite or on tasks that lm-eval has.

    Args:
        model: a causal language model of transformers, on its device.
        tokenizer: its tokenizer.
        tasks: ``commonsense`` or ``math``, whose average is a group's; or names of lm-eval's tasks.
        data: folder of a suite's sets; default ``SMT_DATA``.
        sets: only these of the suite.
        batch_size: prompts a batch.
        autocast: dtype of mixed precision.
        template: of a suite's prompts, as training had it; ``chat`` wants ``apply_chat_template=True``.
        settings: of ``simple_evaluate``, such as ``limit``, ``samples`` and ``use_cache``: answers in
            that file are used, so that it must be this model's own.

    Returns:
        lm-eval's results, on a process other than the first an empty dictionary. Of a prompt that is
        longer than the model's context lm-eval leaves the beginning away, with a warning.

    Raises:
        DataError: a bad row, an absent set (names file and line), an unknown task, or an answer that
            has no room in the model's context.
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
            include_path=str(TASKS), include_defaults=False,
            metadata={"data": data, "template": template},
        )  # fmt: skip
        names = [one.task for one in find_sets(tasks, data, sets)[0]]
        # Unweighted, as in the paper.
        average = {"metric": "acc", "weight_by_size": False}
        group = Group.from_config(GroupConfig(tasks, aggregate_metric_list=[average]))
        for task in manager.load(names)["tasks"].values():
            if template == "alpaca" and task.config.doc_to_text == "prompt":
                task.set_config("target_delimiter", "")  # the prompt ends with a line break
            group.add(task)
        chosen = [group]
    else:
        manager, chosen = TaskManager(), list(tasks)
        if unknown := [task for task in tasks if task not in manager.all_tasks]:
            raise DataError(f"lm-eval has no task {unknown[0]!r}; `lm_eval ls tasks` lists them")

    drawn = random_state()  # lm-eval sets it, and a training loop goes on
    try:
        with evaluating(model):
            lm = HFLM(
                model, tokenizer=tokenizer, batch_size=batch_size, mixed_precision_dtype=autocast
            )
            # It warns of prompts that it cuts.
            logging.getLogger("lm_eval.models.huggingface").setLevel(logging.WARNING)
            results = lm_eval.simple_evaluate(lm, tasks=chosen, task_manager=manager, **settings)
    except AssertionError as error:
        raise DataError(
            f"lm-eval: {error or 'an answer is longer than the context of the model.'} Lower "
            "--max_new_tokens (max_gen_toks), or leave the task away."
        ) from None
    finally:
        set_random_state(drawn)
    return results or {}


def _template(options: argparse.Namespace) -> str:
    """The template of the prompts: the one that was asked for, or that the blocks were trained with."""
    if options.template is not None:
        return str(options.template)
    if options.apply_chat_template:
        return "chat"
    found = "plain" if options.blocks is None else template_of(options.blocks)
    if found != "plain":
        print(f"prompts by the template {found!r}, with which {options.blocks} was trained")
    return found


def model_digest(model: nn.Module) -> str:
    """Of all values of a model, those of its trained blocks included."""
    digests = digests_of_base(model, leave_out=())["tensors"]
    for name, layer in smt_modules(model).items():  # of a quantised base, which they are not in
        blocks = layer.blocks.detach().cpu().view(torch.uint8)
        digests[f"{name}.blocks"] = hashlib.sha256(blocks.numpy().data).hexdigest()
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def _digest(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def _load(
    name: str, source: dict[str, str], info: dict[str, Any] | None, options: argparse.Namespace
) -> nn.Module:
    """The plain model on its device, trained blocks merged into it where given."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wanted = _DTYPES.get(options.precision)
    if options.precision == "auto":
        wanted = training_dtype(device)
    if info is None:
        model = load_model(name, wanted, device, **source)
        stop_repacking(model)  # as in training: rewritten layers round their scales
        return model
    model = load_blocks(load_base(name, info, device, **source), options.blocks)
    if "quantization" in info["metadata"]:
        return model.eval()  # its weights cannot take the blocks
    return unpatch(model).to(device=device, dtype=wanted)
