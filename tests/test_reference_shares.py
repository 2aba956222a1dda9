"""What each of several processes keeps, against numbers worked out by hand."""

from __future__ import annotations

import json

import pytest

from sickbay.cli.main import main
from sickbay.core.plan import Parts
from sickbay.core.shares import Weight, share

# Two blocks, each a 6 x 4 matrix and a vector of 4; an embedding of 10 x 4; float32.
WEIGHTS = (Weight((10, 4), 4, None), *(Weight(shape, 4, block) for block in (0, 1) for shape in ((6, 4), (4,))))
BLOCK, EMBEDDING = 4 * (24 + 4), 4 * 40
WHOLE = EMBEDDING + 2 * BLOCK  # 384 bytes
PARTS = Parts(
    weights=WHOLE,
    gradients=WHOLE,
    optimizer=2 * WHOLE,
    blocks=(680.0, 680.0),
    around=100.0,
    boundary=50.0,
    outputs=0.0,
    logits=60.0,
    rows=4,
)


def test_ddp_keeps_everything_but_the_other_processes_rows() -> None:
    held = share("ddp", PARTS, WEIGHTS, processes=2, rows=4)
    assert (held.rows, held.weights, held.gradients, held.optimizer, held.gathered) == (2, WHOLE, WHOLE, 2 * WHOLE, 0)
    assert (held.activations, held.logits) == (340 + 340 + 50, 30)
    # Weights and moments stand; the most beside them is when the last block's gradients are made (after those of what is around,
    # each a third of all) and both blocks' activations are still there.
    assert held.peak == 3 * WHOLE + 680 + 2 / 3 * WHOLE


def test_fsdp_keeps_a_share_and_gathers_two_blocks_and_what_is_in_none() -> None:
    held = share("fsdp", PARTS, WEIGHTS, processes=2, rows=4)
    assert (held.weights, held.gradients, held.optimizer) == (WHOLE / 2, WHOLE / 2, WHOLE)
    assert held.gathered == (EMBEDDING + 2 * BLOCK) + (EMBEDDING + BLOCK)
    assert held.peak == 1.5 * WHOLE + 680 + 2 / 3 * WHOLE / 2 + held.gathered


def test_rows_that_do_not_come_out_even_fall_to_the_first() -> None:
    held = share("fsdp", PARTS, WEIGHTS, processes=4, rows=4)
    # 10 rows by 4 processes: 3 of 4 values; 6 rows: 2 of 4; 4 values: 1.
    assert held.weights == 4 * (3 * 4 + 2 * (2 * 4 + 1))


def test_tensor_parallel_divides_the_blocks_matrices_and_24_of_34_parts_of_their_activations() -> None:
    held = share("tp", PARTS, WEIGHTS, processes=2, rows=4)
    assert held.rows == 4, "every process sees all rows"
    assert held.weights == EMBEDDING + 2 * 4 * (12 + 4)
    assert held.optimizer == 2 * held.weights
    assert held.activations == pytest.approx(2 * 680 * (10 + 24 / 2) / 34 + 100)
    assert held.logits == 60


def test_frozen_weights_have_neither_gradients_nor_moments() -> None:
    frozen = [Weight(weight.shape, weight.width, weight.block, trainable=weight.block is None) for weight in WEIGHTS]
    parts = Parts(**{**vars(PARTS), "gradients": EMBEDDING, "optimizer": 2 * EMBEDDING})
    held = share("fsdp", parts, frozen, processes=2, rows=4)
    assert (held.weights, held.gradients, held.optimizer) == (WHOLE / 2, EMBEDDING / 2, EMBEDDING)


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "tp"])
def test_one_process_keeps_what_it_keeps_by_itself(kind: str) -> None:
    held = share(kind, PARTS, WEIGHTS, processes=1, rows=4)
    assert (held.weights, held.gradients, held.optimizer, held.gathered) == (WHOLE, WHOLE, 2 * WHOLE, 0)
    assert held.peak == pytest.approx(PARTS.peak)


def test_the_command_plans_for_each_process(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--dim", "64", "--layers", "2", "--vocab", "100", "--context", "32", "--batch", "8", "--processes", "4"]
    assert main([*words, "--json"]) == 0
    ddp, fsdp, tp = json.loads(capsys.readouterr().out)["shares"]
    assert [held["kind"] for held in (ddp, fsdp, tp)] == ["ddp", "fsdp", "tp"]
    assert (ddp["rows"], fsdp["rows"], tp["rows"]) == (2, 2, 8)
    # 2 blocks of 12 D^2 and 2 norms, a last norm, the tied embedding; every axis is a multiple of 4.
    parameters = 2 * (12 * 64**2 + 2 * 64) + 64 + 100 * 64
    assert ddp["weights"] == 4 * parameters and fsdp["weights"] == parameters and fsdp["optimizer"] == 2 * parameters
    assert tp["weights"] == 4 * (2 * (12 * 64**2 // 4 + 2 * 64) + 64 + 100 * 64)
    assert main([*words, "--parallel", "fsdp", "--memory", "1KiB"]) == 0
    shown = capsys.readouterr().out
    assert "on each of 4 processes" in shown and "too much" in shown and "ddp" not in shown


def test_a_way_without_processes_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "gpt2", "--parallel", "tp"]) == 2
    assert "--parallel tp needs --processes N" in capsys.readouterr().err
    assert main(["plan", "--dim", "64", "--processes", "-1"]) == 2
    assert "--processes is -1" in capsys.readouterr().err
