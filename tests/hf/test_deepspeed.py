"""SMTMixin under DeepSpeed's ZeRO, two ranks: what one process trains, saved and resumed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_trainer_ranks import BOUND, losses, trainer_of, whole_state

import smt_ext
from models import tiny_llama
from smt_ext import DataError, PatchError

ROOT = Path(__file__).parents[2]
# A folder of its own, which `make test` installs: where DeepSpeed can be imported, PEFT and transformers
# do so, seconds in every process.
DEEPSPEED = os.environ.get("SMT_EXT_DEEPSPEED", "")
pytestmark = pytest.mark.skipif(
    not Path(DEEPSPEED, "deepspeed").is_dir(), reason="SMT_EXT_DEEPSPEED names no DeepSpeed"
)


def zero(stage, **more):
    example = json.loads((ROOT / "examples" / "zero2.json").read_text())
    return {**example, "zero_optimization": {"stage": stage}, **more}


def runs_of_a_rank(folder):
    """One rank's part, under torchrun."""
    first = trainer_of(folder / "run", "SMT", deepspeed=zero(2))
    first.train()
    first.save_model(str(folder / "blocks"))
    again = trainer_of(folder / "run", "SMT", deepspeed=zero(2))
    again.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-2"))
    found = {
        "losses": losses(first),
        "state": whole_state(first._smt_model),
        "again": whole_state(again._smt_model),
    }
    with pytest.raises(PatchError) as sharded:
        trainer_of(folder / "third", "SMT", deepspeed=zero(3))
    adam = {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto"}}
    theirs = trainer_of(folder / "fourth", "SMT", deepspeed=zero(2, optimizer=adam))
    theirs.smt_config.lr = "0.5"
    theirs.smt_config.__post_init__()
    with pytest.raises(DataError) as unlike:
        theirs.train()
    found["refused"] = [str(sharded.value), str(unlike.value)]
    if first.is_world_process_zero():
        torch.save(found, folder / "found.pt")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deepspeed")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(
            [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent), DEEPSPEED]
        ),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
    }
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *command, __file__, str(folder)], env=environment, text=True,
        capture_output=True, timeout=300, check=False,
    )  # fmt: skip
    assert (folder / "found.pt").exists(), f"{done.stdout}\n{done.stderr}"
    return {**torch.load(folder / "found.pt", weights_only=False), "folder": folder}


def test_it_trains_what_one_process_trains(found, tmp_path):
    alone = trainer_of(tmp_path, "AdamW", per_device_train_batch_size=4, save_strategy="no")
    alone.train()
    assert found["losses"] == pytest.approx(losses(alone), rel=1e-5)
    expected = whole_state(alone.model)
    assert found["state"].keys() == expected.keys()
    for name, value in expected.items():  # the weights, too, which ZeRO does not know of
        torch.testing.assert_close(found["state"][name], value, rtol=0, atol=BOUND, msg=name)
    began = whole_state(trainer_of(tmp_path / "other", "AdamW").model)
    assert any(not torch.equal(began[n], expected[n]) for n in expected if n.endswith("weight"))


def test_the_folder_of_blocks_loads(found):
    model = smt_ext.load_blocks(tiny_llama(), found["folder"] / "blocks")
    for name, value in whole_state(model).items():
        assert torch.equal(value, found["state"][name]), name


def test_it_resumes_from_deepspeeds_checkpoint(found):
    for name, value in found["state"].items():
        assert torch.equal(found["again"][name], value), name


def test_what_cannot_be_is_refused_by_name(found):
    sharded, unlike = found["refused"]
    assert "ZeRO stage 3" in sharded
    assert "names an optimizer" in unlike


if __name__ == "__main__":
    runs_of_a_rank(Path(sys.argv[1]))
