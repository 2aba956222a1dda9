"""The loop on two processes trains what one process trains, and its checkpoints are read by any number."""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import parallel_training
import pytest
import torch
from torch import nn

from sickbay.blueprint import blueprint
from sickbay.core.errors import UsageError
from sickbay.core.shares import share
from sickbay.reference.data.sources import shipped_text
from sickbay.reference.models.config import Config
from sickbay.reference.models.model import Transformer
from sickbay.reference.processes.world import World, rows_by_process, together
from sickbay.reference.saving import checkpoint, shards
from sickbay.reference.settings.recipe import Recipe

KINDS = ("ddp", "fsdp", "tp")
CASES = tuple(" ".join(case) for case in parallel_training.CASES)
EQUAL = 1e-5


def launch(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """What two processes started by torchrun did."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*torchrun, *words], cwd=folder, capture_output=True, text=True, env=environment, timeout=280)


@pytest.fixture(scope="module", params=KINDS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, list[dict[str, Any]]]:
    """(kind, folder, what each of the two processes found)."""
    folder = tmp_path_factory.mktemp(request.param)
    done = launch(folder, str(Path(__file__).with_name("parallel_training.py").resolve()), request.param, str(folder))
    assert done.returncode == 0, done.stderr[-4000:]
    return request.param, folder, [json.loads((folder / f"{request.param}-{rank}.json").read_text()) for rank in (0, 1)]


def gaps(one: dict[str, Any], many: dict[str, Any]) -> float:
    """The largest difference of losses, gradients' norms and validation losses over the steps that both have."""
    steps = [step for step in one["losses"] if step in many["losses"]]
    assert len(steps) == min(len(one["losses"]), len(many["losses"])) >= 2
    numbers = [
        *((one["losses"][step], many["losses"][step]) for step in steps),
        *zip(reversed(one["norms"]), reversed(many["norms"])),
        *zip(reversed(one["validations"]), reversed(many["validations"])),
    ]
    return max(abs(left - right) for left, right in numbers)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_what_one_trains(trained: tuple[str, Path, list[dict[str, Any]]], case: str) -> None:
    _, _, (first, second) = trained
    assert len(first[case]["one"]["losses"]) == 5 and len(first[case]["one"]["validations"]) == 2
    assert max(first[case]["one"]["norms"]) > 0.3, "clipping must be at work"
    assert gaps(first[case]["one"], first[case]["many"]) < EQUAL
    assert first[case]["many"] == second[case]["many"], "all processes tell the same"


@pytest.mark.parametrize("case", CASES)
def test_a_run_goes_on_with_the_same_or_another_number_of_processes(trained: tuple[str, Path, list[dict[str, Any]]], case: str) -> None:
    _, _, (first, _) = trained
    found = first[case]
    resumed = found["many, resumed"]
    assert resumed["losses"] == {step: loss for step, loss in found["many"]["losses"].items() if int(step) > 3}, "bit for bit"
    assert resumed["validations"] == found["many"]["validations"][1:]
    assert gaps(found["one"], found["one, resumed from many"]) < EQUAL
    assert gaps(found["many"], found["many, resumed from one"]) < EQUAL


@pytest.mark.parametrize("case", CASES)
def test_one_process_reads_the_whole_model_of_a_dealt_out_checkpoint(trained: tuple[str, Path, list[dict[str, Any]]], case: str) -> None:
    kind, folder, _ = trained
    name = case.replace(" ", "-")
    many, one = (checkpoint.read(folder / kind / f"{name}{end}") for end in ("", "-one"))
    files = {path.name for path in many.folder.iterdir()}
    dealt = {f"{part}-{rank:05d}-of-00002.safetensors" for part in ("model", "average", "optimizer") for rank in (1, 2)}
    assert dealt <= files if kind != "ddp" else not dealt & files
    assert {"random-00001.safetensors", "random-00002.safetensors"} <= files
    for averaged in (False, True):
        left, right = (checkpoint.load_model(state, averaged=averaged).state_dict() for state in (many, one))
        assert left.keys() == right.keys()
        # Ten times EQUAL: Adam divides by a square root, which rounding near zero turns the other way.
        assert all(torch.allclose(left[key], right[key], atol=10 * EQUAL, rtol=0) for key in left)


def test_a_damaged_part_is_noticed(trained: tuple[str, Path, list[dict[str, Any]]]) -> None:
    kind, folder, _ = trained
    newest = checkpoint.find(folder / kind / "biased-adamw-next-token")
    part = max(newest.glob("model*.safetensors"))
    held = part.read_bytes()
    part.write_bytes(held[:-1] + bytes([held[-1] ^ 1]))
    passed_over: list[str] = []
    try:
        assert checkpoint.read(newest.parent, tell=passed_over.append).step == 3
        assert f"{part.name} has changed" in passed_over[0]
    finally:
        part.write_bytes(held)


def test_the_plan_says_what_each_process_really_holds(trained: tuple[str, Path, list[dict[str, Any]]]) -> None:
    kind, _, found = trained
    config = parallel_training.CONFIGS["biased"]
    vocabulary = len(set(shipped_text().read_text(encoding="utf-8")[:1500]))
    dimensions = {"dim": config.dim, "layers": config.num_layers, "heads": config.num_heads, "context": config.context, "vocab": vocabulary}
    plan = blueprint("", 2, 0, "adamw", dimensions)
    planned = share(kind, plan.parts, plan.weights, processes=2, rows=4)
    for held in found:
        for what in ("weights", "gradients", "optimizer"):
            # Where rows do not come out even the plan is for the process that holds most.
            spare = getattr(planned, what) - held["held"][what]
            assert spare == 0 or (kind == "fsdp" and 0 < spare < 300)
    assert max(held["held"]["weights"] for held in found) == planned.weights


def test_the_command_speaks_once_and_generates_from_parts(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question\n" * 40)
    shape = ("--layers", "1", "--heads", "2", "--dim", "16", "--context", "8", "--batch", "4", "--steps", "2", "--warmup", "1")
    done = launch(tmp_path, "-m", "sickbay", "train", str(text), "--out", "run", *shape, "--parallel", "fsdp")
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("validation loss") == 1
    assert done.stderr.count("step 2/2  validation loss") == 1
    state = checkpoint.read(tmp_path / "run")
    assert checkpoint.load_weights(state)(torch.zeros(1, 8, dtype=torch.int64)).isfinite().all()


def test_processes_and_settings_that_do_not_belong_together_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="parallel is 'tp'; it must be none, ddp or fsdp with precision fp16"):
        Recipe(parallel="tp", precision="fp16")
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UsageError, match="parallel is 'ddp', which torchrun must start"), together("ddp"):
        pass
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="2 processes were started, yet parallel is 'none'"), together("none"):
        pass
    with (
        pytest.raises(UsageError, match="batch_size is 3; with parallel='fsdp' it must be a multiple of the 2 processes"),
        together("fsdp", rows=3),
    ):
        pass


def test_every_row_of_the_joined_projection_has_one_holder_whose_heads_it_serves() -> None:
    config = Config(dim=16, num_heads=4, num_kv_heads=2)  # heads of 4: queries 0-15, keys 16-23, values 24-31
    of_two = [*range(8), *range(16, 20), *range(24, 28), *range(8, 16), *range(20, 24), *range(28, 32)]
    assert rows_by_process("blocks.0.attention.query_key_value.weight", config, 2) == of_two
    assert rows_by_process("blocks.0.attention.query_key_value.weight", config, 1) == list(range(32))
    of_source = [*range(4), *range(8, 12), *range(4, 8), *range(12, 16)]  # keys 0-7, values 8-15
    assert rows_by_process("decoder.blocks.0.cross_attention.key_value.bias", config, 2) == of_source
    assert rows_by_process("decoder.blocks.0.cross_attention.query.weight", config, 2) is None


def test_each_row_is_seen_by_one_part() -> None:
    rows = list(range(10))
    dealt = [rows[World(rank, 3, "ddp").rows] for rank in range(3)]
    assert sorted(itertools.chain(*dealt)) == rows
    assert all(rows[World(rank, 3, "tp").rows] == rows for rank in range(3)), "split heads see every row"


def test_a_checkpoint_of_another_shape_is_refused_by_name(tmp_path: Path) -> None:
    whole = {"weight": torch.arange(6.0).view(2, 3)}
    shards.write(tmp_path, "model", whole, World(), lambda name: None)
    with shards.Stored(tmp_path, "model") as stored:
        assert torch.equal(stored.whole("weight"), whole["weight"])
        with pytest.raises(ValueError, match=r"weight has shape \(2, 3\) in the checkpoint and \(3, 2\) in the model"):
            stored.read_into("weight", torch.zeros(3, 2), World())


def test_names_do_not_depend_on_wrappers() -> None:
    model = Transformer(Config(dim=8, num_layers=1, num_heads=1, vocab_size=5, context=4))
    plain = list(checkpoint.named_weights(model))
    assert "head.weight" not in plain, "tied weights are saved once"
    wrapper = nn.Module()
    wrapper._orig_mod = model.blocks[0]  # as torch.compile does
    model.blocks[0] = wrapper
    assert list(model.state_dict()) != plain
    assert list(checkpoint.named_weights(model)) == plain
