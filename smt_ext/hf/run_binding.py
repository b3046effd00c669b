"""What a checkpoint belongs to: digests of data and tokenizer, and the settings that steer training."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import fields
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any

from datasets.fingerprint import Hasher
from torch.utils.data import IterableDataset
from transformers import TrainingArguments
from transformers.trainer_utils import sort_checkpoints

from .._files import check_list, write_text
from ..checkpoint.artifact import read_json
from ..checkpoint.base_digest import digest_of_config
from ..errors import CheckpointError, DataError

__all__ = [
    "CHECKPOINT_INFO", "binding_of", "check_begins_anew", "check_binding", "checkpoints_in",
    "digest_of_tokenizer", "is_ours", "seal_checkpoint", "verify_checkpoint",
]  # fmt: skip

CHECKPOINT_INFO = "smt_checkpoint.json"
_FORMAT, _VERSION = "smt_ext.trainer_checkpoint", 1

# Of transformers' arguments those that change the steps after a resume; of what a class adds to them
# (SFTConfig, DPOConfig, GRPOConfig, ...) all but _FREE.
_SETTINGS = (
    "seed", "data_seed", "per_device_train_batch_size", "gradient_accumulation_steps",
    "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay", "adam_beta1",
    "adam_beta2", "adam_epsilon", "max_grad_norm", "optim", "optim_args", "bf16", "fp16",
    "label_smoothing_factor", "neftune_noise_alpha", "train_sampling_strategy",
    "average_tokens_across_devices", "dataloader_drop_last", "ignore_data_skip", "world_size",
    "max_steps", "num_train_epochs",
)  # fmt: skip
# How a step is computed, where files lie, and what base model, tokenizer and rows tell themselves.
_FREE = (
    "activation_offloading", "chat_template_path", "dataset_num_proc", "eos_token", "eval_packing",
    "model_init_kwargs", "pad_token", "precompute_ref_batch_size", "trust_remote_code",
)  # fmt: skip
# A finished run may be extended; its steps so far are what they are.
_LENGTH = ("max_steps", "num_train_epochs")


def binding_of(trainer: Any) -> dict[str, Any]:
    """Digests and settings of a trainer by name, before its first step.

    Raises:
        DataError: rows that are other ones each time.
    """
    args, rows, data = trainer.args, trainer.train_dataset, None
    # The rows of a stream that may be others are left to training.
    if not isinstance(rows, IterableDataset) or "data" not in (
        trainer.smt_config.allow_changed or ()
    ):
        check_begins_anew(rows, "train_dataset")
        data = _digest_of_rows(rows)
    plain = {field.name for field in fields(TrainingArguments)}
    added = {f.name: getattr(args, f.name) for f in fields(args) if f.name not in {*plain, *_FREE}}
    given = {name: getattr(args, name) for name in _SETTINGS if hasattr(args, name)}
    given |= {name: value for name, value in added.items() if _is_plain(value)}
    given |= {
        n: getattr(args.accelerator_config, n) for n in ("split_batches", "use_seedable_sampler")
    }
    loss_of = getattr(trainer, "compute_loss_func", None)
    given["compute_loss_func"] = loss_of and getattr(
        loss_of, "__qualname__", type(loss_of).__name__
    )
    config = getattr(trainer._smt_model, "config", None)
    values = {
        "data": data,
        "tokenizer": digest_of_tokenizer(trainer.processing_class),
        "model_config": digest_of_config(config),
        "attn_implementation": getattr(config, "_attn_implementation", None),
        "learning_rate": trainer.learning_rate,
        "decay_to": trainer.smt_config.decay_to,
        **trainer.smt_config.plan_arguments(),
        **{name: getattr(value, "value", value) for name, value in given.items()},
    }
    if args.load_best_model_at_end:  # what the best checkpoint was chosen by, and is compared by
        values["metric_for_best_model"] = args.metric_for_best_model
        values["greater_is_better"] = args.greater_is_better
    held_out: Any = trainer.eval_dataset
    several = held_out.values() if isinstance(held_out, dict) else [held_out]
    # Streams are not read for it unless a best checkpoint is chosen by them.
    if args.load_best_model_at_end or not any(isinstance(r, IterableDataset) for r in several):
        values["eval_data"] = None if held_out is None else _digest_of_rows(held_out)
    bound: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return bound


def _is_plain(value: Any) -> bool:
    """Whether a value is the same as JSON; a function, say, has another name in every process."""
    try:
        return bool(json.loads(json.dumps(value)) == value)
    except (TypeError, ValueError):
        return False


def check_binding(
    values: Mapping[str, Any], info: Mapping[str, Any], where: str, allowed: Iterable[str]
) -> None:
    """Refuse the first difference of a trainer from a checkpoint that was not declared.

    Raises:
        CheckpointError: names it, and what to do; or a name in ``allowed`` that is none of a setting.
    """
    known = {"eval_data", *values, *info["binding"]}
    if unknown := next((name for name in allowed if name not in known), None):
        near = (
            " or ".join(get_close_matches(unknown, known)) or "data, tokenizer or a setting by name"
        )
        raise CheckpointError(f"allow_changed names {unknown!r}, expected {near}")
    finished = info["step"] >= info["max_steps"]
    free = {*allowed, *(_LENGTH if finished else ())}
    for name in [*values, *info["binding"]]:
        before, now = info["binding"].get(name), values.get(name)
        if before == now or name in free:
            continue
        if name == "eval_data" and None in (before, now) and "greater_is_better" not in values:
            continue  # held-out rows that come or go: no loss is beside one of other rows
        if name in ("data", "eval_data", "tokenizer", "model_config"):
            what = f"the {name} is another than {where!r} was trained with"
        else:
            what = f"{name} is {now!r}, and {where!r} was trained with {before!r}"
        raise CheckpointError(
            f"{what}: the run would not go on as it began. Restore it, or declare the change with "
            f"allow_changed={name}."
        )


def seal_checkpoint(folder: Path, binding: Mapping[str, Any], step: int, max_steps: int) -> None:
    """Write what the checkpoint belongs to; with it the folder is a checkpoint of ours."""
    info = {"format": _FORMAT, "version": _VERSION, "step": step, "max_steps": max_steps,
            "binding": binding}  # fmt: skip
    write_text(folder / CHECKPOINT_INFO, json.dumps(info, indent=1) + "\n")


def is_ours(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder is a checkpoint that an SMT trainer completed."""
    return (Path(folder) / CHECKPOINT_INFO).is_file()


def checkpoints_in(folder: Path, *, use_mtime: bool = False) -> list[str]:
    """Those of a run in its folder, by step or by time; a copy of one under another name is none."""
    found = sort_checkpoints(str(folder), use_mtime=use_mtime)
    ours = filter(is_ours, found)
    return [path for path in ours if Path(path).name.removeprefix("checkpoint-").isdigit()]


def verify_checkpoint(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of ``smt_checkpoint.json``, once every file has its checksum.

    Raises:
        CheckpointError: damaged; names the file.
    """
    check_list(Path(folder))
    info = read_json(Path(folder) / CHECKPOINT_INFO)
    if info["version"] != _VERSION:
        raise CheckpointError(
            f"{os.fspath(folder)!r} has version {info['version']!r}, and this smt_ext reads "
            f"{_VERSION}. Update smt_ext."
        )
    return info


def check_begins_anew(rows: Any, name: str) -> None:
    """Refuse a stream whose first row is another when it is read again.

    Raises:
        DataError: a generator that is used up, or rows at random.
    """
    if not isinstance(rows, IterableDataset):
        return
    first, again = (Hasher.hash(next(iter(rows), None)) for _ in range(2))
    if first != again:
        raise DataError(
            f"{name} gives other rows when it is read again, as it is for planning and training. Give "
            "one that begins anew each time, such as IterableDataset.from_generator(function); where "
            "the rows are random, declare allow_changed=data."
        )


def _digest_of_rows(dataset: Any) -> str:
    """Of all rows of a table, in their order; of the first ones of a stream."""
    digest = hashlib.sha256()
    if isinstance(dataset, IterableDataset) and hasattr(dataset, "set_epoch"):
        dataset.set_epoch(0)  # where training begins: a shuffled stream has another order in each
    if isinstance(dataset, Mapping):  # held-out rows of several names
        dataset = [(name, _digest_of_rows(rows)) for name, rows in dataset.items()]
    if hasattr(dataset, "with_format") and hasattr(dataset, "_data"):
        import pyarrow as pa

        for table in dataset.with_format("arrow").iter(batch_size=1000):
            # Without the schema's metadata and its chunks, which are not data.
            table = table.replace_schema_metadata(None).combine_chunks()
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, table.schema) as stream:
                stream.write_table(table)
            digest.update(sink.getvalue())
    else:
        length = len(dataset) if hasattr(dataset, "__len__") else None
        digest.update(repr(length).encode())
        # All rows of what is at hand; those of a stream cost a download.
        for row in islice(iter(dataset), 64 if length is None else length):
            digest.update(Hasher.hash(row).encode())
    return digest.hexdigest()


def digest_of_tokenizer(tokenizer: Any) -> str | None:
    """Of all that decides what text becomes; None without a tokenizer."""
    if tokenizer is None:
        return None
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    core: Any = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = getattr(tokenizer, "get_vocab", dict)
    content = json.loads(core.to_str()) if hasattr(core, "to_str") else vocabulary()
    for passing in ("padding", "truncation"):  # of its last call
        content.pop(passing, None)
    parts = [
        content,
        *(getattr(tokenizer, n, None) for n in ("chat_template", "special_tokens_map")),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
