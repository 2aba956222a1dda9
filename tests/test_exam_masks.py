"""Who sees whom, against models whose masks are known: healthy ones give exactly zero, each planted fault is measured and placed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exam_models import Answers, Attention, D, Model, T, V, answers, loss_of, padded, patient_of, text
from torch import Tensor, nn

from sickbay.exams.fork import NoAnswer
from sickbay.exams.masks import examine
from sickbay.patient import ForwardCall, Patient


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def lm(mask: str, step: int = 0, inside: bool = False, dropout: float = 0.0) -> Answers:
    ids, targets = text()
    if inside:
        patient, (_, loss) = patient_of(Model(mask, dropout=dropout), ids, targets)
    else:
        patient, logits = patient_of(Model(mask, dropout=dropout), ids)
        loss = loss_of(logits, targets)
    return answers(patient, loss, step)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_causal_model_is_exactly_causal(inside: bool, dropout: float) -> None:
    found = lm("causal", inside=inside, dropout=dropout)
    assert found["target_offset"] == 1
    assert found["future_influence"] == found["past_blocked"] == found["row_influence"] == 0
    assert found.note("past_blocked")["nearest_blocked"] is False
    assert found.note("target_offset")["causal"] is True


@pytest.mark.parametrize("mask", ["full", "one ahead", "inverted"])
@pytest.mark.parametrize("inside", [False, True])
def test_a_leak_is_measured_and_placed(mask: str, inside: bool) -> None:
    found = lm(mask, inside=inside)
    assert found["future_influence"] > 0.01
    reading = found.readings["future_influence"]
    assert reading["where"] == "layers.0"
    assert "exam_models.py" in reading["source"]


@pytest.mark.parametrize(("mask", "share", "nearest"), [("inverted", 1.0, True), ("itself only", 1.0, True), ("causal", 0.0, False)])
def test_the_blocked_past(mask: str, share: float, nearest: bool) -> None:
    found = lm(mask)
    assert found["past_blocked"] == share
    assert found.note("past_blocked")["nearest_blocked"] is nearest


def test_a_sliding_window_blocks_far_positions_only() -> None:
    found = lm("window")
    assert 0 < found["past_blocked"] < 1
    assert found.note("past_blocked")["nearest_blocked"] is False
    assert found.note("past_blocked")["span"] == 4  # two layers of two positions back each
    assert found["future_influence"] == 0


def test_tokens_that_fade_on_their_way_are_not_blocked_by_a_mask() -> None:
    ids, targets = text()
    model = Model("causal")
    fading = [part for _ in range(20) for part in (nn.Linear(D, D), nn.Sigmoid())]
    model.tokens = nn.Sequential(model.tokens, *fading)  # type: ignore[assignment]
    patient, logits = patient_of(model, ids)
    assert "past_blocked" not in answers(patient, loss_of(logits, targets)).readings


def test_one_layer_that_misses_the_nearest_position_shows_there() -> None:
    ids, targets = text()
    patient, logits = patient_of(Model("not the nearest", depth=1), ids)
    found = answers(patient, loss_of(logits, targets))
    assert found.note("past_blocked")["nearest_blocked"] is True
    assert found.note("past_blocked")["span"] > 1


def test_a_projection_that_is_still_zero_leaves_the_question_open() -> None:
    model = Model()
    for layer in model.layers:
        nn.init.zeros_(layer.out.weight)
        nn.init.zeros_(layer.out.bias)
    ids, targets = text()
    patient, logits = patient_of(model, ids)
    early = answers(patient, loss_of(logits, targets), step=0)
    assert "past_blocked" not in early and "zero" in early.reasons["past_blocked"]
    late = answers(patient, loss_of(model(ids), targets), step=50)
    assert late["past_blocked"] == 1


def test_a_bidirectional_classifier_is_not_asked_to_be_causal() -> None:
    class Classifier(Model):
        def forward(self, ids: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(ids).mean(1)

    ids, _ = text()
    patient, logits = patient_of(Classifier("full"), ids)
    found = answers(patient, F.cross_entropy(logits, torch.randint(0, V, (len(ids),))))
    assert "future_influence" not in found and "past_blocked" not in found and "target_offset" not in found
    assert found["row_influence"] == 0


def test_a_prefix_that_sees_itself_is_no_leak() -> None:
    ids, targets = text()
    prefix = 8
    allowed = torch.ones(len(ids), T, T, dtype=torch.bool).tril()
    allowed[:, :prefix, :prefix] = True
    targets[:, :prefix] = -100
    patient, logits = patient_of(Model("full"), ids, allowed=allowed)
    assert answers(patient, loss_of(logits, targets))["future_influence"] == 0
    graded = targets.clone()
    graded[:, : prefix - 1] = ids[:, 1:prefix]
    patient, logits = patient_of(Model("full"), ids, allowed=allowed)
    assert answers(patient, loss_of(logits, graded))["future_influence"] > 0.01


class TimeFirst(nn.Module):
    """Encoder-decoder with every tensor `(time, batch)`."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(V, D), nn.Embedding(V, D)
        self.register_buffer("places", torch.randn(64, 1, D) * 0.1)
        self.body, self.head = nn.Transformer(D, 2, 1, 1, 32, 0.1), nn.Linear(D, V)

    def forward(self, source: Tensor, target: Tensor, mask: Tensor | None, source_pad: Tensor | None) -> Tensor:
        x, y = self.source(source) + self.places[: len(source)], self.target(target) + self.places[: len(target)]
        return self.head(self.body(x, y, None, mask, None, source_pad, None, source_pad))


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize(("masked", "padding_passed"), [(True, True), (False, True), (True, False)])
def test_an_encoder_decoder_that_runs_time_first(masked: bool, padding_passed: bool) -> None:
    source, real = padded(12, 14)
    ids, targets = text(12, 11)
    mask = torch.ones(11, 11, dtype=torch.bool).triu(1) if masked else None
    model = TimeFirst()
    patient, logits = patient_of(model, source.t(), ids.t(), mask, real == 0 if padding_passed else None)
    found = answers(patient, loss_of(logits, targets.t()))
    assert found["target_offset"] == 1
    assert found["row_influence"] == 0
    assert (found["future_influence"] > 0.01) is not masked
    assert (found["padding_influence"] > 0.01) is not padding_passed


@pytest.mark.parametrize("per_token", [False, True])
def test_attention_over_the_batch_mixes_rows(per_token: bool) -> None:
    class Encoder(nn.Module):
        def __init__(self, batch_first: bool) -> None:
            super().__init__()
            self.tokens, self.places = nn.Embedding(V, D), nn.Parameter(torch.randn(T, D))
            self.body, self.head = nn.TransformerEncoderLayer(D, 2, 32, batch_first=batch_first), nn.Linear(D, 3)

        def forward(self, ids: Tensor) -> Tensor:
            hidden = self.body(self.tokens(ids) + self.places)
            return self.head(hidden if per_token else hidden.mean(1))

    ids, _ = text()
    labels = torch.randint(0, 3, tuple(ids.shape) if per_token else (len(ids),))
    for batch_first in (True, False):
        patient, logits = patient_of(Encoder(batch_first), ids)
        found = answers(patient, loss_of(logits, labels))
        assert (found["row_influence"] > 0.01) is not batch_first
    assert found.readings["row_influence"]["where"] == "body.self_attn"


@pytest.mark.parametrize("pooled", [True, False])
def test_rows_of_numbers(pooled: bool) -> None:
    class Forecaster(nn.Module):
        def __init__(self, batch_first: bool) -> None:
            super().__init__()
            self.embed, self.places = nn.Linear(3, D), nn.Parameter(torch.randn(1, T, D))
            self.attention, self.head = nn.MultiheadAttention(D, 2, batch_first=batch_first), nn.Linear(D, 3)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.embed(x) + self.places
            hidden = hidden + self.attention(hidden, hidden, hidden, need_weights=False)[0]
            return self.head(hidden[:, -1] if pooled else hidden)

    x = torch.randn(9, T, 3)
    for batch_first in (True, False):
        patient, output = patient_of(Forecaster(batch_first), x)
        found = answers(patient, F.mse_loss(output, torch.randn_like(output)))
        assert (found["row_influence"] > 0.01) is not batch_first
        assert "future_influence" not in found


@pytest.mark.parametrize("zero_head", [False, True])
def test_rows_that_mix_where_the_readout_hides_it(zero_head: bool) -> None:
    class Images(nn.Module):
        """Attention over the rows, read at a token that is the same in all of them: the outputs are constant."""

        def __init__(self, batch_first: bool) -> None:
            super().__init__()
            self.embed, self.token, self.places = (
                nn.Linear(3, D),
                nn.Parameter(torch.randn(1, 1, D)),
                nn.Parameter(torch.randn(1, T + 1, D)),
            )
            self.attention, self.head = nn.MultiheadAttention(D, 2, batch_first=batch_first), nn.Linear(D, 3)
            if zero_head:
                nn.init.zeros_(self.head.weight)

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.cat([self.token.expand(len(x), -1, -1), self.embed(x)], 1) + self.places
            hidden = hidden + self.attention(hidden, hidden, hidden, need_weights=False)[0]
            return self.head(hidden[:, 0])

    x = torch.randn(9, T, 3)
    for batch_first in (True, False):
        patient, output = patient_of(Images(batch_first), x)
        found = answers(patient, F.mse_loss(output, torch.randn_like(output)))
        assert ("row_influence" in found and found["row_influence"] > 0.01) is not batch_first
    assert found.readings["row_influence"]["where"] == "attention"


@pytest.mark.parametrize("masked", [True, False])
def test_padding_under_a_bidirectional_mask(masked: bool) -> None:
    ids, real = padded()
    allowed = (real == 1)[:, None] if masked else None
    patient, logits = patient_of(Model("full"), ids, allowed=allowed, attention_mask=real)
    labels = torch.randint(0, V, tuple(ids.shape)).masked_fill((real == 0) | (torch.rand(ids.shape) > 0.5), -100)
    found = answers(patient, loss_of(logits, labels))
    assert (found["padding_influence"] > 0.001) is not masked
    if masked:
        assert found["padding_influence"] == 0
    assert found.note("padding_influence")["pad_id"] == 0


def test_padding_on_the_right_of_a_causal_model_is_healthy_and_on_the_left_is_not() -> None:
    for left in (False, True):
        ids, real = padded(left=left)
        targets = torch.cat([ids[:, 1:], ids[:, :1]], 1).masked_fill(torch.cat([real[:, 1:], real[:, :1] * 0], 1) == 0, -100)
        patient, logits = patient_of(Model(), ids, attention_mask=real)
        found = answers(patient, loss_of(logits, targets))
        assert (found["padding_influence"] > 0.001) is left
        assert found["past_blocked"] == 0


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("known", ["positions", "documents"])
def test_packed_documents(apart: bool, known: str) -> None:
    ids, targets = text()
    numbers = (torch.arange(T) >= 9).long().expand(len(ids), -1)
    places = torch.cat([torch.arange(9), torch.arange(T - 9)]).expand(len(ids), -1)
    allowed = numbers[:, :, None] == numbers[:, None] if apart else None
    told = {"position_ids": places} if known == "positions" else {"document_ids": numbers}
    patient, logits = patient_of(Model(), ids, allowed=allowed, **told)
    found = answers(patient, loss_of(logits, targets))
    assert (found["packing_influence"] > 0.01) is not apart
    if apart:
        assert found["packing_influence"] == 0
    assert found["past_blocked"] == 0  # what is kept apart on purpose is not blocked


def test_concatenated_text_is_not_asked_about_packing() -> None:
    assert "packing_influence" not in lm("causal")


def test_parameters_in_a_dict_are_run_again_through_the_function() -> None:
    parameters = {"table": torch.randn(V, D), "qk": torch.randn(D, D) / D, "head": torch.randn(D, V)}

    def loss_function(p: dict[str, Tensor], ids: Tensor, targets: Tensor, leak: bool) -> Tensor:
        h = p["table"][ids]
        scores = h @ p["qk"] @ h.transpose(1, 2)
        if not leak:
            scores = torch.where(torch.ones(T, T).tril() == 1, scores, torch.tensor(-1e30))
        return F.cross_entropy(((h + scores.softmax(-1) @ h) @ p["head"]).flatten(0, 1), targets.flatten())

    ids, targets = text()
    for leak in (False, True):
        patient = Patient()
        patient.functional = lambda leak=leak: loss_function(parameters, ids, targets, leak)
        found = answers(patient, None)
        assert found["target_offset"] == 1
        assert (found["future_influence"] > 0.01) is leak
        # Nothing can be called: the graph alone answers.
        trained = {name: value.clone().requires_grad_() for name, value in parameters.items()}
        by_graph = answers(Patient(), loss_function(trained, ids, targets, leak))
        assert by_graph["target_offset"] == 1 and by_graph["past_blocked"] == by_graph["row_influence"] == 0
        assert (by_graph["future_influence"] > 0.01) is leak


@pytest.mark.parametrize("mask", ["causal", "full", "inverted"])
def test_a_model_in_separate_parts_is_judged_as_a_whole(mask: str) -> None:
    tokens, body, head = nn.Embedding(V, D), Attention(mask), nn.Linear(D, V)
    ids, targets = text()
    patient = Patient()
    hidden: Tensor = ids
    for part in (tokens, body, head):
        patient.calls.append(ForwardCall(part, (hidden,), {}, True, True, torch.get_rng_state(), "train.py:7", finished=True))
        hidden = part(hidden) if part is not body else hidden + part(hidden)
    found = answers(patient, loss_of(hidden, targets))
    assert (found["future_influence"] > 0) is (mask != "causal")
    assert found["past_blocked"] == (1.0 if mask == "inverted" else 0.0)


def test_half_precision_hides_nothing() -> None:
    model = Model().bfloat16()
    ids, targets = text()
    patient, logits = patient_of(model, ids)
    found = answers(patient, loss_of(logits.float(), targets))
    assert found["past_blocked"] == 0 and found["future_influence"] == 0
    assert next(model.parameters()).dtype == torch.bfloat16


def test_nothing_of_the_run_is_changed() -> None:
    model = Model(dropout=0.3).train()
    ids, targets = text()
    patient, logits = patient_of(model, ids)
    loss = loss_of(logits, targets)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    answers(patient, loss)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters()) and not patient.muted
    loss.backward()  # type: ignore[no-untyped-call]


def test_a_forward_that_never_repeats_gives_its_reason() -> None:
    class Restless(Model):
        calls = 0

        def forward(self, ids: Tensor) -> Tensor:  # type: ignore[override]
            self.calls += 1
            return super().forward(ids) + self.calls

    ids, targets = text()
    patient, logits = patient_of(Restless(), ids)
    found = answers(patient, loss_of(logits, targets))
    assert "future_influence" not in found and "repeat" in found.reasons["future_influence"]


def test_without_a_forward_or_a_graph_there_is_no_answer() -> None:
    found = examine(Patient(), torch.tensor(1.0), 0)
    assert isinstance(found, NoAnswer) and "forward" in found.reason


@pytest.mark.parametrize("ending", ["logits", "probabilities", "experts"])
def test_a_model_that_passes_nothing_between_positions_has_no_mask(ending: str) -> None:
    class Bigram(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.gate, self.head = nn.Embedding(V, D), nn.Linear(D, 4), nn.Linear(D, V)
            self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(4))

        def forward(self, ids: Tensor) -> Tensor:
            x: Tensor = self.embedding(ids)
            if ending == "experts":
                weights = self.gate(x).softmax(-1)
                x = torch.stack([e(x) for e in self.experts], -1).mul(weights.unsqueeze(-2)).sum(-1)
            scores: Tensor = self.head(x)
            return scores.softmax(-1) if ending == "probabilities" else scores

    ids, targets = text()
    patient, logits = patient_of(Bigram(), ids)
    found = answers(patient, loss_of(logits, targets), 0)
    assert found["target_offset"] == 1
    assert "past_blocked" not in found.readings


class Zeroing(Model):
    """Embeddings of id 0 are zeroed by a comparison in the forward."""

    def forward(self, ids: Tensor, *_: Any, **__: Any) -> Tensor:
        x = self.tokens(ids).masked_fill((ids == 0)[..., None], 0.0) + self.positions[: ids.shape[1]]
        for layer in self.layers:
            x = x + layer(self.norm(x))
        logits: Tensor = self.head(self.norm(x))
        return logits


@pytest.mark.parametrize("inside", [True, False])
def test_an_id_that_is_compared_is_padding_only_where_it_fills_ends(inside: bool) -> None:
    ids, real = padded()
    if inside:
        ids = torch.randint(1, V, tuple(ids.shape))
        ids[:, 3], ids[0, -1] = 0, 0  # a token like others, by chance at an end
    patient, logits = patient_of(Zeroing("full"), ids)
    labels = torch.randint(0, V, tuple(ids.shape)).masked_fill((real == 0) | (torch.rand(ids.shape) > 0.5), -100)
    found = answers(patient, loss_of(logits, labels))
    assert ("padding_influence" in found) is not inside
