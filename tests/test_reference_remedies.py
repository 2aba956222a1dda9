"""What may be added to a training, each against a closed form or against the training without it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import commands
import pytest
import recomputing
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from sickbay.cli import train as train_command
from sickbay.reference import data, train
from sickbay.reference.evaluation.evaluation import evaluate
from sickbay.reference.models.config import Config
from sickbay.reference.models.encoder_decoder import EncoderDecoder
from sickbay.reference.models.model import Transformer
from sickbay.reference.saving import checkpoint
from sickbay.reference.settings.recipe import Recipe
from sickbay.reference.training.ema import averaged
from sickbay.reference.training.loss import next_token_loss
from sickbay.reference.training.machine import demand_compiler, processor
from sickbay.reference.training.muon import QUINTIC, ROUNDS, orthogonalized, stacked_step
from sickbay.reference.training.optimizer import hidden_matrices, make_adamw, make_optimizer, set_learning_rate, stack_groups
from sickbay.reference.training.precision import WIDE, autocast, make_scaler, settled, slow_here
from sickbay.reference.training.schedule import learning_rate_at
from sickbay.reference.training.stopping import Patience

TINY = Config(dim=16, num_layers=5, num_heads=2, vocab_size=11, context=12, dropout=0.3)
SMALL = ("--layers", "1", "--heads", "2", "--dim", "16", "--context", "16", "--batch", "4", "--warmup", "2", "--dropout", "0.1")


def model_of(config: Config = TINY) -> Transformer:
    torch.manual_seed(0)
    return Transformer(config)


def ids_of(rows: int = 3, positions: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(0, TINY.vocab_size, (rows, positions), generator=torch.Generator().manual_seed(seed))


# Schedules


@given(st.sampled_from(["cosine", "linear", "wsd"]), st.integers(0, 5000), st.integers(0, 300), st.integers(1, 3000), st.floats(0.05, 1))
def test_every_schedule_falls_from_its_peak_to_its_floor_and_stays(kind: Any, step: int, warmup: int, steps: int, share: float) -> None:
    def rate(at: int) -> float:
        return learning_rate_at(at, peak=1e-3, floor=1e-4, warmup=warmup, steps=steps, schedule=kind, decay_share=share)

    assert 0 < rate(step) <= 1e-3
    if step >= warmup:
        assert rate(step + 1) <= rate(step)
    if step >= max(steps, warmup + 1):
        assert rate(step) == pytest.approx(1e-4)


def test_schedules_have_their_shapes() -> None:
    def rates(kind: Any) -> list[float]:
        return [learning_rate_at(at, peak=1.0, floor=0.0, warmup=10, steps=110, schedule=kind, decay_share=0.5) for at in (9, 10, 60, 85)]

    rise = 10 / 11
    assert rates("constant") == [rise, 1.0, 1.0, 1.0]
    assert rates("linear") == pytest.approx([rise, 1.0, 0.5, 0.25])
    assert rates("cosine") == pytest.approx([rise, 1.0, 0.5, (1 + math.cos(math.pi * 0.75)) / 2])
    assert rates("wsd") == pytest.approx([rise, 1.0, 50 / 55, 25 / 55])  # the decay begins at step 55


# Muon


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 100))
@settings(deadline=None)
def test_orthogonalizing_sends_each_singular_value_through_the_quintic(rows: int, columns: int, seed: int) -> None:
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    a, b, c = QUINTIC
    s = s / s.norm()
    for _ in range(ROUNDS):
        s = a * s + b * s**3 + c * s**5
    torch.testing.assert_close(orthogonalized(matrix), u @ torch.diag(s) @ v, rtol=1e-3, atol=1e-3)


def stacked_parts(name: str, matrix: Tensor) -> list[tuple[slice, Tensor]]:
    """Queries, keys and values, which lie in one matrix `(3 x 16, 16)`, apart; any other matrix as it is."""
    rows = [slice(begin, begin + 16) for begin in (0, 16, 32)] if "query_key_value" in name else [slice(None)]
    return [(part, matrix[part]) for part in rows]


def test_muon_moves_hidden_matrices_by_its_own_rate_and_the_rest_exactly_as_adamw_does() -> None:
    config = Config(dim=16, num_layers=2, num_heads=2, vocab_size=11, context=12, tied_embeddings=False, bias=True)
    muon_model, adam_model = model_of(config), model_of(config)
    muon = make_optimizer(muon_model, Recipe(optimizer="muon", learning_rate=0.01, matrix_learning_rate=0.05, momentum=0.9))
    adam = make_adamw(adam_model, learning_rate=0.01, betas=(0.9, 0.99), weight_decay=0.1)
    hidden = {id(weight) for weight in hidden_matrices(muon_model)}
    names = {name for name, weight in muon_model.named_parameters() if id(weight) in hidden}
    assert names == {name for name, weight in muon_model.named_parameters() if name.startswith("blocks.") and weight.dim() == 2}
    before = {name: weight.detach().clone() for name, weight in muon_model.named_parameters()}
    for step in range(3):
        for model in (muon_model, adam_model):
            torch.manual_seed(step)
            for weight in model.parameters():
                weight.grad = torch.randn_like(weight)
        muon.step()
        adam.step()
        if step == 0:
            for name, weight in muon_model.named_parameters():
                if name in names:
                    assert weight.grad is not None
                    # From rest, momentum points along the gradient: the step is its orthogonalization.
                    parts = [(part, (before[name] - weight)[rows]) for rows, part in stacked_parts(name, weight.grad)]
                    for gradient, moved in parts:
                        stretch = 0.05 * math.sqrt(max(1, len(gradient) / gradient.shape[1]))
                        torch.testing.assert_close(moved / stretch, orthogonalized(gradient), rtol=1e-2, atol=1e-3)
    others = dict(adam_model.named_parameters())
    assert all(torch.equal(weight, others[name]) for name, weight in muon_model.named_parameters() if name not in names)
    set_learning_rate(muon, 0.002)
    assert [group["lr"] for group in muon.param_groups] == pytest.approx([0.01, 0.01, 0.002, 0.002])


def test_matrices_that_share_a_tensor_are_orthogonalized_each_by_itself() -> None:
    # Two processes' rows of queries, keys and values: heads of 2, four of queries, two of keys and values; values a hundred times larger.
    width = 8
    query, key, value = (torch.randn(rows, width, generator=torch.Generator().manual_seed(rows)) for rows in (8, 4, 4))
    held = torch.cat([query[:4], key[:2], 100 * value[:2], query[4:], key[2:], 100 * value[2:]])
    moved = stacked_step(held, (4, 2, 2))
    whole = torch.cat([orthogonalized(query), orthogonalized(key), orthogonalized(value)])
    order = [*range(4), *range(8, 10), *range(12, 14), *range(4, 8), *range(10, 12), *range(14, 16)]
    torch.testing.assert_close(moved, whole[order], rtol=1e-4, atol=1e-4)
    assert (stacked_step(held, ()) - moved).abs().max() > 0.1


def test_an_encoder_decoders_keys_and_values_are_two_matrices_to_muon() -> None:
    model = EncoderDecoder(Config(dim=16, num_layers=1, num_heads=4, num_kv_heads=2, vocab_size=11, context=12))
    stacks = {group["stack"]: len(group["params"]) for group in stack_groups(model)}
    assert stacks == {(16, 8, 8): 2, (8, 8): 1, (): 3 + 5}  # three of each block's, the query and the output across; no head


# The loss


def test_smoothing_and_z_loss_are_what_they_are_called() -> None:
    model, ids, targets = model_of().eval(), ids_of(), ids_of(seed=1)
    targets[0, :5] = -100
    logits = model(ids).flatten(0, 1)
    counts = targets.flatten() != -100
    log_p, own = logits.log_softmax(-1)[counts], targets.flatten()[counts]
    plain = -log_p.gather(1, own[:, None]).mean()
    torch.testing.assert_close(next_token_loss(model, ids, targets), plain)
    smoothed = 0.9 * plain - 0.1 * log_p.mean()
    torch.testing.assert_close(next_token_loss(model, ids, targets, label_smoothing=0.1), smoothed)
    z = logits.exp().sum(-1).log()[counts]
    torch.testing.assert_close(next_token_loss(model, ids, targets, z_loss=0.01), plain + 0.01 * (z**2).mean())


# Recomputing activations


def gradients(kind: Any) -> tuple[list[Tensor], int]:
    return recomputing.gradients(model_of(), kind, lambda model: next_token_loss(model, ids_of(), ids_of(seed=1)))


@pytest.mark.parametrize("kind", ["block", "sqrt"])
def test_recomputed_gradients_are_bit_equal_with_dropout_and_less_is_kept(kind: str) -> None:
    (plain, everything), (again, little) = gradients("none"), gradients(kind)
    assert len(plain) == len(again) == len(list(model_of().parameters()))
    assert all(torch.equal(*pair) for pair in zip(plain, again))
    assert little < everything / 2


# The averaged weights


def test_the_average_is_its_closed_form() -> None:
    model = nn.Linear(1, 1, bias=False)
    average = averaged(model, 0.5)
    expected = 0.0
    for number, value in enumerate((1.0, 2.0, 4.0, 8.0)):
        nn.init.constant_(model.weight, value)
        average.update_parameters(model)
        decay = min(0.5, (1 + number) / (10 + number))
        expected = value if number == 0 else decay * expected + (1 - decay) * value
        assert average.module.weight.item() == pytest.approx(expected)


# Half precision


def test_a_scaled_step_clips_the_true_norm_and_leaves_out_what_overflowed() -> None:
    def step(scale: bool, overflow: bool = False) -> list[Tensor]:
        model = model_of(Config(dim=16, num_layers=1, num_heads=2, vocab_size=11, context=12))
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        scaler = make_scaler("fp16" if scale else "fp32", "cpu")
        train.backward(scaler.scale(next_token_loss(model, ids_of(), ids_of(seed=1))), 1.0)
        if overflow:
            next(model.parameters()).grad[0, 0] = math.inf  # type: ignore[index]
        train.update(model, optimizer, 0.01, scaler)
        return [weight.detach() for weight in model.parameters()]

    for plain, scaled in zip(step(False), step(True)):
        torch.testing.assert_close(plain, scaled)
    untouched = model_of(Config(dim=16, num_layers=1, num_heads=2, vocab_size=11, context=12))
    assert all(torch.equal(*pair) for pair in zip(step(True, overflow=True), untouched.parameters()))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_products_are_in_half_precision_and_weights_are_not(precision: Any) -> None:
    model = model_of().eval()
    exact = next_token_loss(model, ids_of(), ids_of(seed=1))
    with autocast(precision, "cpu"):
        logits = model(ids_of())
        loss = next_token_loss(model, ids_of(), ids_of(seed=1))
    assert logits.dtype in (torch.bfloat16, torch.float16)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=2e-2)
    loss.backward()
    assert {weight.grad.dtype for weight in model.parameters() if weight.grad is not None} == {torch.float32}


def test_a_processor_without_bf16_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert "slower" in (slow_here("bf16", "cpu") or "")
    assert slow_here("fp32", "cpu") is None and slow_here("bf16", "cuda") is None
    assert settled("auto", WIDE, "cpu") == "fp32"
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert slow_here("bf16", "cpu") is None
    assert settled("auto", WIDE, "cpu") == "bf16" and settled("auto", WIDE - 1, "cpu") == "fp32"
    assert settled("fp16", WIDE, "cpu") == "fp16" and settled("fp32", WIDE, "cpu") == "fp32"


def test_normalised_queries_stay_out_of_half_precision(recwarn: pytest.WarningsRecorder) -> None:
    model = model_of(Config(dim=16, num_layers=1, num_heads=2, vocab_size=11, context=12, qk_norm=True))
    with autocast("bf16", "cpu"):
        next_token_loss(model, ids_of(), ids_of(seed=1)).backward()
    assert not [str(warning.message) for warning in recwarn]  # torch's: "Cannot dispatch to fused implementation"


# The process


def test_threads_and_denormals_are_put_back() -> None:
    tiny, before = torch.tensor(1e-40), torch.get_num_threads()
    with processor(1, True):
        assert torch.get_num_threads() == 1
        assert (tiny * 1.0).item() == 0.0
    assert torch.get_num_threads() == before
    assert (tiny * 1.0).item() > 0.0


def test_compiling_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"compile is True; torch\.compile needs a C\+\+ compiler \(no-such-compiler\)"):
        demand_compiler("cpu")


# Stopping


def test_patience_counts_evaluations_without_a_better_loss() -> None:
    patience = Patience(2)
    assert [patience.improves(loss) for loss in (3.0, 2.0, 2.0)] == [True, True, False]
    assert not patience.over
    again = Patience(2)
    again.restore(patience.state())
    assert not again.improves(2.5) and again.over
    assert not Patience(None).over


def call(*words: str | Path) -> int:
    return commands.call(train_command, *words)


def test_a_run_that_gets_worse_stops_and_keeps_its_best(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    # Far too high a learning rate after a good beginning: a constant one on so little text overfits or breaks, the loss rises.
    words = ("--lr", "0.1", "--schedule", "constant", "--steps", "300", "--eval-every", "10", "--patience", "3", "--seed", "1")
    call(text, "--out", run, *SMALL, *words)
    said = capsys.readouterr()
    last, best = checkpoint.read(run), checkpoint.read(run / train.BEST)
    assert "stops: 3 evaluations without" in said.err
    assert best.step < last.step < 300
    assert last.step - best.step == 30
    assert str(best.folder) in said.out
    call("--out", run, "--resume", "--patience", "4")
    assert checkpoint.read(run).step > last.step


REMEDIES: dict[str, tuple[str, ...]] = {
    "muon": ("--optimizer", "muon"),
    "average": ("--ema", "0.9"),
    "half precision": ("--precision", "fp16"),
    "recomputing": ("--recompute", "sqrt"),
    "smoothing": ("--label-smoothing", "0.1", "--z-loss", "1e-4"),
    "patience": ("--patience", "9"),
}


@pytest.mark.parametrize("name", REMEDIES)
def test_a_resumed_run_with_a_remedy_ends_bit_for_bit_where_an_unbroken_one_does(tmp_path: Path, text: Path, name: str) -> None:
    words = (*SMALL, *REMEDIES[name], "--steps", "8", "--save-every", "3", "--eval-every", "2")
    call(text, "--out", tmp_path / "whole", *words)
    stops_at(7, lambda: call(text, "--out", tmp_path / "broken", *words))
    assert checkpoint.read(tmp_path / "broken").step == 6
    call("--out", tmp_path / "broken", "--resume")
    whole, broken = (checkpoint.find(tmp_path / run) for run in ("whole", "broken"))
    files = {file.name for file in whole.glob("*.safetensors")}
    assert ("average.safetensors" in files) == (name == "average")
    for file in files:
        first, second = load_file(whole / file), load_file(broken / file)
        assert [key for key in first if not torch.equal(first[key], second[key])] == [], file
    assert checkpoint.read(tmp_path / "whole").progress == checkpoint.read(tmp_path / "broken").progress


def stops_at(step: int, work: Callable[[], Any]) -> None:
    """`work` dies in its optimizer step number `step`."""
    real, calls = train.update, 0

    def dies(*inputs: Any, **named: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == step:
            raise RuntimeError("died")
        real(*inputs, **named)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="died"):
        patch.setattr(train, "update", dies)
        work()


def test_the_average_is_what_is_evaluated(tmp_path: Path, text: Path) -> None:
    call(text, "--out", tmp_path / "run", *SMALL, "--steps", "20", "--ema", "0.9", "--lr", "0.05")
    state = checkpoint.read(tmp_path / "run")
    weights, average = checkpoint.load_weights(state), checkpoint.load_weights(state, averaged=True)
    corpus = data.prepare(text, tmp_path / "tokens", tokenizer=state.tokenizer)

    def loss(model: Transformer) -> float:
        return evaluate(model, data.spread_batches(corpus.val, 16, 4)).loss

    assert loss(average) != loss(weights)


@pytest.mark.slow
def test_a_compiled_model_trains_alike() -> None:
    losses = []
    for compiled in (False, True):
        model = model_of(Config(dim=16, num_layers=2, num_heads=2, vocab_size=11, context=12))
        if compiled:
            model.compile()
        optimizer = make_optimizer(model, Recipe())
        for step in range(5):
            loss = next_token_loss(model, ids_of(seed=step), ids_of(seed=step + 1))
            train.backward(loss, 1.0)
            train.update(model, optimizer, 1.0)
        losses.append(loss.item())
        assert functional.relu(torch.tensor(losses)).min() > 0
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
