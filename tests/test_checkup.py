"""The checkup before a run: what it finds, what it leaves in peace, and that it leaves everything as it was."""

from __future__ import annotations

import hashlib
import math
import random

import numpy
import pytest
import torch
from checkup_targets import VOCABULARY, Applied, Deaf, RoundThrough, WrongSilu, batches, next_token, tiny
from torch import Tensor, nn
from torch.nn import functional

import sickbay
import sickbay.examiner  # here, not first under a patched can_fork, which it would keep
from sickbay.checklist import isolation
from sickbay.checklist.overfit import floor_of, overfit_row
from sickbay.checklist.pace import rates_row
from sickbay.core.errors import UsageError
from sickbay.exams import fork

QUICK = 15.0


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> str:
    """A digest of weights, gradients, buffers, modes, attributes, optimizer state and every random state."""
    digest = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(f"{name} {tensor.dtype} {tensor.requires_grad} {id(tensor)}".encode() + tensor.detach().numpy().tobytes())
        digest.update(b"no gradient" if tensor.grad is None else tensor.grad.numpy().tobytes())
    for module in model.modules():
        digest.update(f"{module.training} {sorted(vars(module))} {len(module._forward_hooks)}".encode())
    if optimizer is not None:
        digest.update(repr(optimizer.state_dict()).encode())
    digest.update(repr((random.getstate(), numpy.random.get_state())).encode() + torch.get_rng_state().numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("forked", [True, False])
def test_everything_is_left_as_it_was(forked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(dropout=0.1).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids, targets = next(batches())
    next_token(model(ids), targets).backward()
    optimizer.step()
    before = state_of(model, optimizer)
    if not forked:
        monkeypatch.setattr(fork, "can_fork", lambda: "CUDA is in use")
    checklist = sickbay.checkup(model, batches(), next_token, optimizer, seconds=2)
    assert state_of(model, optimizer) == before
    assert [row.verdict for row in checklist.rows].count("ok") > 8, str(checklist)
    assert torch.get_default_dtype() == torch.float32


def test_kept_puts_back_what_a_question_changed() -> None:
    from sickbay.checklist.target import of_parts

    model = tiny()
    before = state_of(model)
    with isolation.kept(of_parts(model, batches(), next_token)):
        model.double().eval()
        model.extra = 1
        next(model.parameters()).data.fill_(float("nan"))
        torch.rand(3), random.random(), numpy.random.rand()
    assert state_of(model) == before


def test_at_most_24_batches_are_taken_and_random_states_are_kept() -> None:
    taken = []

    def counted():
        for batch in batches():
            taken.append(torch.rand(1))
            yield batch

    before = torch.get_rng_state()
    sickbay.checkup(tiny(), counted(), next_token, only=["shapes"])
    assert len(taken) == 24
    assert torch.equal(torch.get_rng_state(), before)


def test_a_healthy_model_is_clean() -> None:
    checklist = sickbay.checkup(tiny(), batches(), next_token, seconds=QUICK, skip=["throughput"])
    assert checklist.verdict == "healthy", str(checklist)
    for exam in ("shapes", "finite", "gradients", "weights", "initial-loss", "labels", "causality", "batches", "derivative", "settings"):
        assert checklist.row(exam).verdict == "ok", str(checklist)
    assert checklist.row("settings").data["effect"] == ["num_heads", "causal", "dropout"]


def found(model: nn.Module, loss=next_token, data=batches, optimizer=None, only=()) -> list[str]:
    checklist = sickbay.checkup(model, data(), loss, optimizer, only=only, seconds=QUICK)
    assert checklist.verdict == "sick", str(checklist)
    return [finding.condition for finding in checklist.findings]


def test_a_model_that_sees_the_future_is_found() -> None:
    assert found(tiny(causal=False), only=["causality"])[0] == "causal-leak"


def test_a_wrong_backward_is_found_with_its_line_and_a_straight_through_one_is_not() -> None:
    model = tiny()
    model.mlp[2] = Applied(WrongSilu)
    checklist = sickbay.checkup(model, batches(), next_token, only=["derivative"])
    (finding,) = checklist.findings
    assert finding.condition == "wrong-gradient" and finding.severity == "critical"
    assert "checkup_targets.py:" in finding.source and "WrongSilu" in finding.summary
    model.mlp[2] = Applied(RoundThrough)
    assert sickbay.checkup(model, batches(), next_token, only=["derivative"]).row("derivative").verdict == "ok"


def test_a_setting_that_nothing_reads_is_found() -> None:
    torch.manual_seed(0)
    checklist = sickbay.checkup(Deaf(), batches(), next_token, only=["settings"])
    (finding,) = checklist.findings
    assert (finding.condition, finding.where) == ("setting-without-effect", "use_rope")
    assert checklist.row("settings").data["effect"] == ["num_heads"]


def test_inputs_that_say_nothing_are_found_by_overfitting() -> None:
    def blank():
        for ids, targets in batches():
            yield torch.zeros_like(ids), targets

    assert found(tiny(), data=blank, only=["overfit"]) == ["unlearnable-data"]


def test_a_softmax_before_the_loss_is_found_by_overfitting() -> None:
    class Squashed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny()

        def forward(self, ids: Tensor) -> Tensor:
            return self.inner(ids).softmax(-1)

    assert found(Squashed(), only=["overfit"]) == ["squashed-logits"]


def test_a_loss_that_stops_at_the_bound_of_a_second_softmax_is_told_from_one_that_stops_elsewhere() -> None:
    seen = {"target": 0.0, "floor": 0.0, "marginal": 2.8, "targets": 100, "examples": 10, "norm": 0.1, "moves": True, "bounds": [-9.0, 9.0]}
    seen |= {"quiet": True, "in_time": True, "classes": 17, "parameters": 10_000, "rate": 1e-3, "trials": {}}
    bound = torch.tensor(math.e + 16).log().item() - 1
    row, (finding,) = overfit_row({**seen, "losses": [2.84] + [bound + 0.05] * 400}, set())
    assert (finding.condition, finding.severity) == ("squashed-logits", "warning")
    row, (finding,) = overfit_row({**seen, "losses": [2.84] + [bound - 0.5] * 400}, set())
    assert (finding.condition, finding.severity) == ("cannot-overfit", "note")
    row, findings = overfit_row({**seen, "losses": [2.84] + [0.1] * 400}, set())
    assert (row.verdict, findings) == ("ok", [])
    row, findings = overfit_row({**seen, "losses": [2.84 - step * 0.01 for step in range(100)], "in_time": False}, set())
    assert (row.verdict, findings) == ("not examined", [])


def test_equal_rows_and_a_loud_head_are_found() -> None:
    same = tiny()
    nn.init.constant_(same.mlp[1].weight, 0.1)
    assert found(same, only=["weights"]) == ["poor-initialization"]
    loud = tiny()
    nn.init.normal_(loud.head.weight, std=3.0)
    assert "poor-initialization" in found(loud, only=["initial-loss", "weights"])


def test_zero_initialised_matrices_are_no_fault() -> None:
    model = tiny()
    nn.init.zeros_(model.out.weight)
    nn.init.zeros_(model.mlp[3].weight)
    assert sickbay.checkup(model, batches(), next_token, only=["weights", "gradients"]).verdict == "healthy"


def test_a_batch_that_does_not_get_through_is_the_one_finding() -> None:
    model = tiny()
    model.head = nn.Linear(5, VOCABULARY)
    checklist = sickbay.checkup(model, batches(), next_token)
    assert [finding.condition for finding in checklist.findings] == ["shape-mismatch"]
    assert checklist.row("shapes").verdict == "found"
    assert checklist.row("overfit").text == "the first batch does not get through"


def test_a_loss_without_a_graph_is_found() -> None:
    assert found(tiny(), lambda outputs, targets: next_token(outputs.detach(), targets))[0] == "missing-gradient"


def test_nan_in_the_batch_is_named() -> None:
    def spoilt():
        x = torch.randn(8, 4)
        x[3, 1] = float("nan")
        return [(x, torch.randint(2, (8,)))]

    assert found(nn.Linear(4, 2), functional.cross_entropy, spoilt, only=["finite"])[0] == "non-finite-input"


@pytest.mark.parametrize(
    "loss, data",
    [
        (lambda model, batch: next_token(model(batch["x"]), batch["y"]), lambda: ({"x": x, "y": y} for x, y in batches())),
        (lambda outputs, labels: next_token(outputs, labels), lambda: ({"ids": x, "labels": y} for x, y in batches())),
        (lambda outputs, targets: (next_token(outputs, targets), "more"), lambda: [next(batches())]),
    ],
)
def test_calling_conventions(loss, data) -> None:
    assert sickbay.checkup(tiny(), data(), loss, only=["shapes", "gradients"]).row("gradients").verdict == "ok"


def test_the_models_own_loss() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny()

        def forward(self, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            logits = self.inner(ids)
            return logits, next_token(logits, targets)

    assert sickbay.checkup(Own(), batches(), only=["gradients"]).verdict == "healthy"


def test_the_floor_is_the_entropy_of_the_continuations() -> None:
    ids = torch.tensor([[1, 2, 3], [1, 2, 4], [5, 6, 7], [5, 6, 7]])
    seen = floor_of([(ids[:, :-1], ids[:, 1:])])
    # Of eight targets two have one context and go on with 3 or 4: two coins of eight.
    assert seen["floor"] == pytest.approx(2 * torch.tensor(2.0).log().item() / 8)
    labels = floor_of([(torch.tensor([[0.0], [0.0], [1.0]]), torch.tensor([0, 1, 1]))])
    assert labels["floor"] == pytest.approx(2 * torch.tensor(2.0).log().item() / 3)


def test_the_range_test_speaks_of_a_rate_beyond_the_turn_only() -> None:
    rates = [1e-6 * 1.5**step for step in range(40)]
    losses = [4.0 if rate < 1e-4 else 3.0 if rate < 1e-1 else 9.0 for rate in rates]
    seen = {"curve": list(zip(rates, losses)), "given": 1e-3, "optimizer": "AdamW", "out_of_time": False}
    assert rates_row(seen)[0].verdict == "ok"
    row, (finding,) = rates_row({**seen, "given": 0.5})
    assert row.verdict == "found" and finding.certainty == "suspected"


@pytest.mark.parametrize(
    "arguments, text",
    [
        ((None, []), "the model is of type NoneType"),
        ((nn.Linear, []), "is the class Linear"),
        ((nn.Linear(2, 2, device="meta"), []), "on the meta device"),
        ((nn.ReLU(), []), "no trainable parameter"),
        ((nn.Linear(2, 2), iter(())), "exhausted"),
        ((nn.Linear(2, 2), torch.zeros(3)), r"one Tensor"),
        ((nn.Linear(2, 2), [["words"]]), "holds no tensor"),
        ((nn.Linear(2, 2), (1 / 0 for _ in range(1))), "ZeroDivisionError"),
        ((nn.Linear(2, 2), [torch.zeros(2, 2)], "mse"), "the loss is of type str"),
        ((nn.Linear(2, 2), [torch.zeros(2, 2)], None, "adam"), "the optimizer is of type str"),
    ],
)
def test_what_cannot_be_examined_is_said(arguments, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        sickbay.checkup(*arguments)


def test_an_unknown_exam_is_refused() -> None:
    with pytest.raises(UsageError, match="did you mean overfit"):
        sickbay.checkup(tiny(), batches(), next_token, only=["overfitt"])
