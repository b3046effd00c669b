"""Results of an evaluation row by row on disk, so that a stopped evaluation goes on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor, nn

from .errors import CheckpointError, DataError

__all__ = ["Journal", "model_digest"]

FORMAT, VERSION = "smt_ext.suite_rows", 1

# A row's key: set, measure, index of the row in the set's file.
Key = tuple[str, str, int]


class Journal:
    """Append-only JSON lines: a header, the digest of each set's file, and one line a result.

    What is in the header and in the digests decides the results; a journal with others is refused.
    A last line cut off by a crash is dropped.

    Args:
        path: made if need be.
        header: JSON values.

    Raises:
        DataError: the file belongs to another model, other data or other settings; names which.
        CheckpointError: the file is damaged, or no journal.
    """

    def __init__(self, path: str | os.PathLike[str], header: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.header = {"format": FORMAT, "version": VERSION, **header}
        self.results: dict[Key, dict[str, Any]] = {}
        self._data: dict[str, str] = {}
        self._file: TextIO | None = None
        self._read()

    def check_data(self, name: str, digest: str) -> None:
        """Note the digest of a set's file; refuse another one than the journal's rows came from.

        Raises:
            DataError: the file has changed.
        """
        known = self._data.get(name)
        if known is None:
            self._write({"set": name, "sha256": digest})
            self._data[name] = digest
        elif known != digest:
            raise DataError(
                f"the file of the set {name!r} is another one than {str(self.path)!r} was begun "
                f"with. {_WAY_OUT}"
            )

    def add(self, key: Key, result: Mapping[str, Any]) -> None:
        """Append one result."""
        name, measure, row = key
        self.results[key] = dict(result)
        self._write({"set": name, "measure": measure, "row": row, **result})

    def flush(self) -> None:
        """Hand what was added to the operating system."""
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        """Close the file; the results stay readable."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, line: Mapping[str, Any]) -> None:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", encoding="utf-8")
            if self._file.tell() == 0:
                self._file.write(json.dumps(self.header) + "\n")
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def _read(self) -> None:
        if not self.path.exists():
            return
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(self.path, whole)
        lines = content[:whole].split(b"\n")[:-1]
        if not lines:
            return
        try:
            header, *rest = [json.loads(line) for line in lines]
        except ValueError as error:
            raise CheckpointError(
                f"{str(self.path)!r} is damaged: {error}. Remove it, or choose another --output."
            ) from None
        if not isinstance(header, dict) or header.get("format") != FORMAT:
            raise CheckpointError(f"{str(self.path)!r} is no {FORMAT} file")
        for name, value in self.header.items():
            if (before := header.get(name)) != value:
                if name == "model":  # digests; the numbers say nothing
                    raise DataError(
                        f"{str(self.path)!r} was begun with another model: its weights are not "
                        f"those of this one. {_WAY_OUT}"
                    )
                raise DataError(
                    f"{str(self.path)!r} was begun with {name} = {before!r}, and this evaluation has "
                    f"{value!r}. {_WAY_OUT}"
                )
        for line in rest:
            if "sha256" in line:
                self._data[line["set"]] = line["sha256"]
            else:
                key = (line.pop("set"), line.pop("measure"), line.pop("row"))
                self.results[key] = line


_WAY_OUT = "Choose another --output, or pass --overwrite to begin anew."


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
