"""Every fault that the bugs chapter injects into the reference is really there, and the treatments that act do and undo what they say."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sickbay
from sickbay import registry
from sickbay.reference.case import Case, run
from sickbay.treatments.register_parameters import treatment as register_parameters
from sickbay.treatments.revive_relu import treatment as revive_relu
from sickbay.treatments.tie_weights import treatment as tie_weights
from sickbay.treatments.train_mode import treatment as train_mode

MINE = [
    "shape-mismatch",
    "token-id-out-of-range",
    "causal-leak",
    "mask-blocks-past",
    "padding-attended",
    "packing-contamination",
    "batch-mixing",
    "label-misalignment",
    "padding-in-loss",
    "eos-masked",
    "missing-gradient",
    "missing-backward",
    "optimizer-missing-parameters",
    "optimizer-not-stepped",
    "update-not-applied",
    "accumulation-weighting",
    "eval-mode-in-training",
    "train-mode-in-evaluation",
    "untied-embeddings",
    "dead-relu",
    "data-repeats",
]


def sick(id_: str, **changes: Any) -> Case:
    inject = registry.conditions()[id_].inject
    assert inject is not None
    case: Case = inject(Case(steps=6, eval_every=3, **changes))
    return case


def batch(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    return next(case.batches(case, "train"))


def moves(model: nn.Module, ids: torch.Tensor, row: Any, position: Any, **inputs: Any) -> torch.Tensor:
    """How far each output `(B, T)` moves when the tokens at `row`, `position` change."""
    model.eval()
    other = ids.clone()
    other[row, position] = (other[row, position] + 1) % 60
    with torch.no_grad():
        return (model(ids, **inputs) - model(other, **inputs)).abs().amax(-1)


@pytest.mark.parametrize("id_", [id_ for id_ in MINE if id_ not in ("shape-mismatch", "token-id-out-of-range")])
def test_every_other_fault_trains_silently(id_: str) -> None:
    _, losses = run(sick(id_))
    assert len(losses) == 6 and all(math.isfinite(loss) for loss in losses)


def test_injected_errors_are_raised() -> None:
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        run(sick("shape-mismatch"))
    with pytest.raises(IndexError, match="out of range"):
        run(sick("token-id-out-of-range"))


def test_injected_masks() -> None:
    healthy, leaky, blind = Case(), sick("causal-leak"), sick("mask-blocks-past")
    ids, _ = batch(healthy)
    for case, sees_future, sees_past in ((healthy, False, True), (leaky, True, True), (blind, False, False)):
        torch.manual_seed(0)
        moved = moves(case.build(case), ids, slice(None), 10)
        assert (moved[:, :10].max() > 0) == sees_future
        assert (moved[:, 11:14].min() > 0) == sees_past


def test_injected_batch_mixing() -> None:
    ids, _ = batch(Case())
    for case, mixes in ((Case(), False), (sick("batch-mixing"), True)):
        assert (moves(case.build(case), ids, 0, slice(None))[1:].max() > 0) == mixes


def test_injected_padding_is_attended() -> None:
    case = sick("padding-attended")
    assert case.config.pad_id is not None
    ids, targets = batch(case)
    pad = ids == case.config.pad_id
    assert pad.any() and (targets[pad] == case.config.pad_id).all()
    for build, attended in ((case.build, True), (Case().build, False)):
        torch.manual_seed(0)
        model = build(case).eval()
        with torch.no_grad():
            before = model(ids)
            model.token_embedding.weight[case.config.pad_id] += 1.0
            moved = (before - model(ids))[..., : case.config.pad_id].abs().amax(-1)
        assert (moved[~pad].max() > 0) == attended


def test_injected_packing_is_contaminated() -> None:
    case = sick("packing-contamination")
    ids, _ = batch(case)
    documents = (torch.arange(ids.shape[1]) >= ids.shape[1] // 2).long().expand(ids.shape)
    for build, contaminated in ((case.build, True), (Case().build, False)):
        moved = moves(build(case), ids, slice(None), 3, documents=documents)
        assert (moved[:, ids.shape[1] // 2 :].max() > 0) == contaminated


def test_injected_targets() -> None:
    padded, ended = sick("padding-in-loss"), sick("eos-masked")
    assert (batch(padded)[1] == padded.config.pad_id).float().mean() > 0.1
    ids, targets = batch(ended)
    ends = ids == ended.config.pad_id
    assert (ends[:, :-1] & ~ends[:, 1:]).any(1).all(), "end tokens between texts, not only at the end"
    assert torch.equal(ends[:, 1:], (targets == ended.config.pad_id)[:, :-1])
    seen: dict[str, torch.Tensor] = {}

    class Spy(nn.Module):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            seen["ids"] = ids
            return torch.zeros(*ids.shape, 65)

    twice = sick("label-misalignment")
    ids, targets = batch(twice)
    twice.loss(twice, Spy(), ids, targets)
    assert seen["ids"].shape[1] == ids.shape[1] - 1


def test_injected_gradients_and_updates() -> None:
    cut = sick("missing-gradient")
    model = cut.build(cut)
    cut.backward(cut, cut.loss(cut, model, *batch(cut)))
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert without == {name for name, _ in model.named_parameters() if name.startswith("blocks.0.")}

    loose = sick("optimizer-missing-parameters")
    model = loose.build(loose)
    held = {id(p) for group in loose.optimizer(loose, model).param_groups for p in group["params"]}
    loose.backward(loose, loose.loss(loose, model, *batch(loose)))
    assert all(p.grad is not None and id(p) not in held for block in model.blocks for p in block.parameters())

    for id_, moved_elements in (("optimizer-not-stepped", 0), ("missing-backward", 0), ("update-not-applied", 1)):
        case = sick(id_)
        model = case.build(case)
        optimizer = case.optimizer(case, model)
        before = [p.detach().clone() for p in model.parameters()]
        case.backward(case, case.loss(case, model, *batch(case)))
        case.update(case, model, optimizer)
        assert max(int((a != b).sum()) for a, b in zip(before, model.parameters())) == moved_elements, id_


def test_injected_accumulation_is_summed() -> None:
    case = sick("accumulation-weighting")
    weight = nn.Parameter(torch.ones(()))
    case.backward(case, 3.0 * weight)
    assert case.accumulation == 4 and weight.grad is not None and weight.grad.item() == 3.0


def test_injected_modes() -> None:
    modes: dict[bool, set[bool]] = {True: set(), False: set()}
    for id_, with_gradient in (("eval-mode-in-training", True), ("train-mode-in-evaluation", False)):
        case = sick(id_)

        def watched(case: Case, build: Any = case.build) -> nn.Module:
            model: nn.Module = build(case)
            model.register_forward_hook(lambda module, args, output: modes[torch.is_grad_enabled()].add(module.training))
            return model

        modes[True], modes[False] = set(), set()
        run(case.but(build=watched))
        assert case.config.dropout > 0
        assert modes == ({True: {False}, False: {False}} if with_gradient else {True: {True}, False: {True}})


def test_injected_weights_units_and_data() -> None:
    untied = sick("untied-embeddings")
    model = untied.build(untied)
    assert untied.config.tied_embeddings and model.head.weight is not model.token_embedding.weight
    assert torch.equal(model.head.weight, model.token_embedding.weight)

    dead = sick("dead-relu")
    model = dead.build(dead)
    alive: list[bool] = []
    for block in model.blocks:
        block.feed_forward.activation.register_forward_hook(lambda module, args, output: alive.append(bool((output > 0).any())))
    model(batch(dead)[0])
    assert alive == [False] * len(model.blocks)

    repeated = sick("data-repeats")
    first, second, third = (ids for ids, _ in itertools.islice(repeated.batches(repeated, "train"), 3))
    assert torch.equal(first, second) and torch.equal(second, third)


# --- treatments that act -----------------------------------------------------------------------------------------------
class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head, self.relu = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False), nn.ReLU()


def patient(root: nn.Module | None, *optimizers: Any) -> Any:
    return SimpleNamespace(root=root, optimizers=set(optimizers))


def test_train_mode_and_its_undo() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout()))
    model[1].eval()
    undo = train_mode.on(patient(model))
    assert all(module.training for module in model.modules())
    undo()
    assert [module.training for module in model.modules()] == [True, True, False, False]
    with pytest.raises(ValueError, match="no model"):
        train_mode.on(patient(None))


def test_register_parameters_and_its_undo() -> None:
    model = Tied()
    model.embed.weight.requires_grad_(False)
    model.extra = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.head.parameters(), lr=0.5, weight_decay=0.0)
    undo = register_parameters.on(patient(model, optimizer))
    added = optimizer.param_groups[-1]
    assert {id(p) for p in added["params"]} == {id(p) for p in model.extra.parameters()} and added["lr"] == 0.5
    model.extra(torch.ones(1, 2)).sum().backward()
    before = model.extra.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(before, model.extra.weight)
    undo()
    assert len(optimizer.param_groups) == 1 and not optimizer.state
    with pytest.raises(ValueError, match="in an optimizer already"):
        register_parameters.on(patient(model.head, optimizer))
    with pytest.raises(ValueError, match="has not seen both"):
        register_parameters.on(patient(model))


def test_tie_weights_and_its_undo() -> None:
    model = Tied()
    own = model.head.weight
    undo = tie_weights.on(patient(model), pair=("embed", "head"))
    assert model.head.weight is model.embed.weight
    undo()
    assert model.head.weight is own
    with pytest.raises(ValueError, match=r"unknown: tail\.weight"):
        tie_weights.on(patient(model), pair=("embed", "tail"))
    model.head = nn.Linear(3, 4, bias=False)
    with pytest.raises(ValueError, match="they must be equal"):
        tie_weights.on(patient(model), pair=("embed", "head"))
    with pytest.raises(ValueError, match="no model"):
        tie_weights.on(patient(None), pair=("embed", "head"))


def test_revive_relu_and_its_undo() -> None:
    model = Tied()
    relu = model.relu
    undo = revive_relu.on(patient(model))
    x = torch.tensor([-1.0], requires_grad=True)
    model.relu(x).backward()
    assert x.grad is not None and x.grad.item() == pytest.approx(0.01)
    undo()
    assert model.relu is relu
    with pytest.raises(ValueError, match=r"no nn\.ReLU"):
        revive_relu.on(patient(nn.Linear(1, 1)))


def test_advice_says_that_only_a_person_can_follow_it() -> None:
    prescribed = {id_ for name in MINE for id_ in registry.conditions()[name].prescribes}
    acting = {"train-mode", "register-parameters", "tie-weights", "revive-relu"}
    for id_ in prescribed:
        treatment = registry.treatments()[id_]
        assert (treatment.apply is not None) == (id_ in acting) == (treatment.safety != "advice")
        if id_ not in acting:
            with pytest.raises(ValueError, match="is advice"):
                treatment.on(patient(None))


class Body(nn.Module):
    """A model of a library's kind: its configuration says that embeddings are shared, whether it has a head or not."""

    def __init__(self, head: bool) -> None:
        super().__init__()
        self.config = {"tie_word_embeddings": True}
        self.tokens = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11) if head else nn.Identity()

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.tokens(ids))
        return out


@pytest.mark.parametrize("inside", [False, True])
def test_a_declaration_speaks_of_the_module_that_makes_it(tmp_path: Path, inside: bool) -> None:
    model = nn.Sequential(Body(inside), *([] if inside else [nn.Linear(6, 11)]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with sickbay.watch(model, optimizer, out=tmp_path / "run") as doctor:
        for _ in range(3):
            nn.functional.cross_entropy(model(torch.randint(11, (4, 5))).flatten(0, 1), torch.randint(11, (20,))).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert [reading.value for reading in doctor.chart()["tied_weights"]] == ([0.0] if inside else [])
