"""Gradients, optimizers, modes, weights and data of the bugs chapter: sick, healthy, exactly at the threshold, too short, NaN."""

from __future__ import annotations

from typing import Any

import pytest

from sickbay.core.chart import Chart, Reading
from tests.charts import chart
from tests.verdicts import ask, found, read, unexamined

NAN = float("nan")


# --- gradients and the optimizer -----------------------------------------------------------------------------------------
def absent(changes: bool | None, value: float = 2, backwards: int = 3, where: str = "blocks.0", step: int = 1) -> Reading:
    return read("gradient_absent", value, step, where, names=["a", "b"], changes_output=changes, op="detach", backwards=backwards)


def test_missing_gradient() -> None:
    verdict = found("missing-gradient", chart(gradient_absent=[absent(False, 9, where="head"), absent(True)]), "critical")
    assert (verdict.where, verdict.step) == ("blocks.0", 1)
    assert "2 trainable parameter tensors have had no gradient" in verdict.summary and "cut at detach" in verdict.summary
    assert "unused" in found("missing-gradient", chart(gradient_absent=[absent(False)]), "note").summary
    assert found("missing-gradient", chart(gradient_absent=[absent(None, backwards=3)]), "warning").certainty == "likely"
    assert "fewer than 3" in unexamined("missing-gradient", chart(gradient_absent=[absent(None, backwards=2)]))
    assert ask("missing-gradient", chart(loss=[1.0])) is None
    assert ask("missing-gradient", chart(gradient_absent=[absent(True), absent(True, 0, step=2)])) is None, "the gradient came later"
    assert ask("missing-gradient", chart(gradient_absent=[absent(True, NAN)])) is None


def backwards(*values: float, **others: Any) -> Chart:
    return chart(backwards_since_step=[read("backwards_since_step", v, step, "AdamW") for step, v in enumerate(values)], **others)


def test_missing_backward() -> None:
    verdict = found("missing-backward", backwards(0, 0, 0), "critical")
    assert verdict.step == 0 and verdict.where == "AdamW" and "3 of 3 optimizer steps" in verdict.summary
    assert found("missing-backward", backwards(*[1] * 18, 0, 0), "critical").step == 18, "exactly one step in ten"
    assert found("missing-backward", backwards(*[1] * 19, 0, 0), "note")
    assert found("missing-backward", backwards(1, 1, 0), "note")
    assert found("missing-backward", backwards(0), "note")
    assert ask("missing-backward", backwards(1, 4, 1)) is None
    assert unexamined("missing-backward", backwards(NAN))
    assert unexamined("missing-backward", chart(loss=[1.0]))


def test_gradients_written_by_hand_need_no_backward() -> None:
    assert ask("missing-backward", backwards(0, 0, 0, 0, grad_norm=[1.0, 1.1, 0.9, 1.3])) is None
    assert found("missing-backward", backwards(0, 0, 0, 0, grad_norm=[1.0, 1.0, 1.0, 1.0]), "critical")


def test_gradients_zeroed_between_backward_and_step() -> None:
    assert "found no gradient" in found("missing-backward", backwards(1, 1, loss=[2.0, 2.0]), "critical").summary
    assert found("missing-backward", backwards(1, 1, loss=[2.0, 2.0], grad_norm=[0.0, 0.0]), "critical")
    assert ask("missing-backward", backwards(1, 1, loss=[2.0, 2.0], grad_norm=[0.0, 0.1])) is None
    assert ask("missing-backward", backwards(1, 1, loss=[2.0, 2.0], grad_norm=[NAN, NAN])) is None
    assert ask("missing-backward", backwards(1, 1, loss=[2.0, 2.0], unobserved={"grad_norm": "its probe failed"})) is None
    assert ask("missing-backward", backwards(1, 1, loss=[2.0, 2.0], update_ratio=[0.1])) is None, "sparse gradients have no dense norm"


def missing(kind: str, value: float = 4) -> Reading:
    return read("missing_from_optimizer", value, 1, "head.weight", "train.py:30", names=["head.weight", "head.bias"], kind=kind, share=0.25)


@pytest.mark.parametrize(
    ("kind", "text"), [("unregistered", "plain list"), ("created-later", "after the optimizer"), ("skipped", "not given")]
)
def test_optimizer_missing_parameters(kind: str, text: str) -> None:
    stale = read("stale_in_optimizer", 2, 1, shapes=[[3, 3]])
    verdict = found(
        "optimizer-missing-parameters",
        chart(missing_from_optimizer=[missing("upstream"), missing(kind)], stale_in_optimizer=[stale]),
        "critical",
    )
    assert text in verdict.summary and "4 parameter tensors (head.weight, head.bias), 25%" in verdict.summary
    assert [e.reading.signal for e in verdict.evidence] == ["missing_from_optimizer", "stale_in_optimizer"]
    assert (verdict.step, verdict.where, verdict.source) == (1, "head.weight", "train.py:30")


def test_parameters_left_out_on_purpose_or_stale() -> None:
    id_ = "optimizer-missing-parameters"
    assert "before the trained part" in found(id_, chart(missing_from_optimizer=[missing("upstream")]), "note").summary
    adapters = read("missing_from_optimizer", 4, kind="upstream", frozen=12)
    assert "left trainable" in found(id_, chart(missing_from_optimizer=[adapters]), "critical").summary
    assert "no longer has" in found(id_, chart(stale_in_optimizer=[read("stale_in_optimizer", 2)]), "note").summary
    assert ask(id_, chart(missing_from_optimizer=[missing("skipped", 0), missing("skipped", NAN)])) is None
    assert ask(id_, chart(loss=[1.0])) is None


def waiting(value: float, facts: dict[str, Any] | None = None, others: tuple[float, ...] = (), **note: Any) -> Chart:
    return chart(facts, backwards_without_step=[read("backwards_without_step", value, where="Adam", **note)], backwards_since_step=others)


def test_optimizer_not_stepped() -> None:
    id_ = "optimizer-not-stepped"
    assert "9 backward calls" in found(id_, waiting(9, optimizers=1, scaler_skips=0), "critical").summary
    assert "may still come" in unexamined(id_, waiting(8, optimizers=1, scaler_skips=0))
    assert found(id_, waiting(2, {"ended": "finished"}, optimizers=1), "critical")
    assert found(id_, waiting(2, {"ended_inside": "finished"}, optimizers=1), "critical")
    assert unexamined(id_, waiting(1, {"ended": "finished"}, optimizers=1))
    assert ask(id_, waiting(20, optimizers=0)) is None
    assert ask(id_, waiting(20, optimizers=1, scaler_skips=20)) is None
    assert found(id_, waiting(20, optimizers=2, others=(1, 1)), "note")
    assert found(id_, waiting(20, optimizers=2, alone=False, others=(1, 1)), "note"), "another optimizer has its parameters"
    assert "no other optimizer has them" in found(id_, waiting(20, optimizers=2, alone=True, others=(1, 1)), "critical").summary
    assert found(id_, waiting(8, {"ended": "finished"}, optimizers=2, alone=True, others=(1, 1)), "note"), "its turn may be yet to come"
    nobody = [read("backwards_without_step", 20, optimizers=1)]
    assert ask(id_, chart(backwards_without_step=nobody, backwards_since_step=[1, 1])) is None, "no optimizer of its own"
    assert ask(id_, waiting(NAN, optimizers=1)) is None
    zeroed = [read("dropped_backwards", 1, 0, "Adam", finite_loss=True)] * 9
    assert "9 backward calls and not one step of Adam" in found(id_, chart(dropped_backwards=zeroed), "critical").summary
    assert unexamined(id_, chart(dropped_backwards=zeroed[:8]))
    assert ask(id_, chart(dropped_backwards=zeroed, backwards_since_step=[1])) is None
    assert ask(id_, chart(dropped_backwards=[read("dropped_backwards", 20, finite_loss=False)])) is None, "skipped on purpose"
    assert ask(id_, chart(loss=[1.0])) is None


def unmoved(*values: float, where: str = "w", rounding: float = 0.0, first: int = 1) -> list[Reading]:
    return [read("unmoved_share", v, first + i, where, elements=100, moved=1, rounding=rounding) for i, v in enumerate(values)]


def test_update_not_applied() -> None:
    id_ = "update-not-applied"
    verdict = found(id_, chart(unmoved_share=[*unmoved(0.99, 0.99), *unmoved(0.0, 0.0, where="v")]), "critical")
    assert "99.0% of the elements of w" in verdict.summary and "1 of 2 tensors" in verdict.summary and verdict.where == "w"
    assert ask(id_, chart(unmoved_share=unmoved(0.5, 0.5))) is None
    assert ask(id_, chart(unmoved_share=unmoved(0.99, 0.99, rounding=0.5))) is None, "rounding explains half of them"
    assert ask(id_, chart(unmoved_share=unmoved(0.99, 0.0, 0.0))) is None
    assert "1 sampled" in unexamined(id_, chart(unmoved_share=unmoved(0.99)))
    assert unexamined(id_, chart(unmoved_share=unmoved(1.0, 1.0), learning_rate=[0.0, 0.0, 0.0])), "a warm-up that begins at 0"
    assert unexamined(id_, chart(unmoved_share=unmoved(NAN, NAN)))


def test_update_not_applied_by_hand() -> None:
    """A script may leave most rows of one tensor alone on purpose; most of all tensors it does not."""
    id_ = "update-not-applied"
    by_hand = {"elements": 100, "moved": 1, "rounding": 0.0, "by_hand": True}
    stuck = [read("unmoved_share", 0.99, step, where, **by_hand) for where in ("a", "b") for step in (1, 2)]
    moving = [read("unmoved_share", 0.0, step, where, **by_hand) for where in ("c", "d") for step in (1, 2)]
    assert found(id_, chart(unmoved_share=[*stuck, *moving[:2]]), "critical").where == "a"
    assert ask(id_, chart(unmoved_share=[*stuck, *moving])) is None, "exactly half of the tensors"


def weights(*values: float, count: int = 4, worst: float = 0.0, **others: Any) -> Chart:
    return chart(loss_weight_sum=[read("loss_weight_sum", v, step, count=count, worst=worst) for step, v in enumerate(values)], **others)


def test_accumulation_weighting() -> None:
    id_ = "accumulation-weighting"
    assert "add up to 4 (1 is right)" in found(id_, weights(4.0, 4.0), "critical").summary
    assert "once more" in found(id_, weights(0.25, 0.25), "critical").summary
    assert found(id_, weights(2.0, 2.0, count=2), "critical")
    assert found(id_, weights(4.6, 4.6), "critical") and ask(id_, weights(4.61, 4.61)) is None, "15 % off k"
    assert ask(id_, weights(1.0, 1.0, worst=0.2)) is None
    assert "21% off" in found(id_, weights(1.0, 1.0, worst=0.21), "warning").summary
    assert ask(id_, weights(900.0, 900.0)) is None, "a loss summed over tokens is a choice"
    assert "1 steps" in unexamined(id_, weights(4.0))
    assert unexamined(id_, weights(NAN, NAN)) and ask(id_, weights(1.0, 1.0, worst=NAN)) is None
    assert unexamined(id_, weights(1.0, 1.0, count=1))


def test_gradients_divided_at_every_micro_batch() -> None:
    note = {"count": 4, "weights": [1 / 256, 1 / 64, 1 / 16, 1 / 4], "worst": 2.01, "divided_between": True}
    sick = [read("loss_weight_sum", 0.332, step, **note) for step in (1, 2)]
    verdict = found("accumulation-weighting", chart(loss_weight_sum=sick), "critical")
    assert "0.00391, 0.0156, 0.0625, 0.25" in verdict.summary
    mean = [read("loss_weight_sum", 1.0, step, **{**note, "worst": 0.0}) for step in (1, 2)]
    assert ask("accumulation-weighting", chart(loss_weight_sum=mean)) is None, "a running mean divides, too, and weighs all the same"


def test_dropped_cycles() -> None:
    def dropped(value: float, finite: bool | None = None) -> list[Reading]:
        return [read("dropped_backwards", value, 2, finite_loss=finite)]

    id_ = "accumulation-weighting"
    assert "2 backward calls (20%)" in found(id_, weights(1.0, 1.0, dropped_backwards=dropped(2)), "warning").summary
    assert found(id_, weights(*[1.0] * 19, dropped_backwards=dropped(4)), "note"), "exactly 5 %"
    assert ask(id_, weights(1.0, 1.0, dropped_backwards=dropped(2, finite=False))) is None
    assert unexamined(id_, chart(dropped_backwards=dropped(2))), (
        "no accumulation: a generator's gradients in the critic are dropped on purpose"
    )


# --- modes -------------------------------------------------------------------------------------------------------------
def mode(signal: str, count: int = 3, last_step: int = 19, **values: Any) -> Chart:
    """Readings at the named steps (`at_4=0.0`), as a probe writes them: when the mode changes."""
    rows = [read(signal, v, int(name[3:]), "dropout", count=count, modules=["dropout"], repeats=1) for name, v in values.items()]
    return chart(loss={last_step: 1.0}, **{signal: rows})


def test_eval_mode_in_training() -> None:
    id_ = "eval-mode-in-training"
    verdict = found(id_, mode("training_mode", at_0=1.0, at_5=0.0), "warning")
    assert verdict.step == 5 and "In 15 of 20 training steps all 3" in verdict.summary
    assert found(id_, mode("training_mode", at_0=0.0, at_2=1.0), "warning"), "two steps, a tenth of the run"
    assert ask(id_, mode("training_mode", at_0=0.0, at_1=1.0)) is None
    assert ask(id_, mode("training_mode", at_0=0.0, at_2=1.0, last_step=20)) is None, "less than a tenth of the run"
    assert ask(id_, mode("training_mode", at_0=1.0)) is None
    assert ask(id_, mode("training_mode", at_0=0.3)) is None, "batch-norm frozen on purpose"
    assert unexamined(id_, mode("training_mode", at_0=0.0, last_step=0))
    assert unexamined(id_, mode("training_mode", at_0=0.0, count=0))
    assert unexamined(id_, mode("training_mode", at_0=NAN))


def test_train_mode_in_evaluation() -> None:
    id_ = "train-mode-in-evaluation"
    verdict = found(id_, mode("evaluation_mode", at_5=1.0), "warning")
    assert verdict.step == 5 and "100% of the 3" in verdict.summary
    assert found(id_, mode("evaluation_mode", at_5=0.0, at_8=1.0), "warning").step == 8
    assert ask(id_, mode("evaluation_mode", at_5=1.0, at_6=0.0)) is None, "one look in training mode"
    in_each_step = [read("evaluation_mode", 1.0, 1, count=2), read("evaluation_mode", 1.0, 5, count=0, every_step=True)]
    assert ask(id_, chart(evaluation_mode=in_each_step)) is None, "labels that the model gives itself in each step"
    assert ask(id_, mode("evaluation_mode", at_5=0.5)) is None
    assert ask(id_, mode("evaluation_mode", at_5=0.0)) is None
    assert unexamined(id_, mode("evaluation_mode", at_5=NAN)) and unexamined(id_, mode("evaluation_mode", count=0, at_5=1.0))


def test_monte_carlo_dropout_is_on_purpose() -> None:
    def passes(*steps_and_repeats: tuple[int, int]) -> Chart:
        return chart(evaluation_mode=[read("evaluation_mode", 1.0, step, count=2, repeats=repeats) for step, repeats in steps_and_repeats])

    id_ = "train-mode-in-evaluation"
    assert ask(id_, passes((5, 1), (5, 2), (5, 3))) is None
    assert ask(id_, passes((5, 3))) is None
    assert found(id_, passes((5, 1), (5, 2)), "warning")
    assert found(id_, passes((5, 1), (5, 2), (10, 2), (10, 3), (15, 3), (15, 4)), "warning"), (
        "one validation set, evaluated again after each epoch"
    )


# --- weights and units -------------------------------------------------------------------------------------------------
def test_untied_embeddings() -> None:
    def tie(*values: float) -> Chart:
        rows = [
            read("tied_weights", v, s, "head.weight", pair=["embed", "head"], declared_by="config.tie_word_embeddings")
            for s, v in enumerate(values)
        ]
        return chart(tied_weights=rows)

    verdict = found("untied-embeddings", tie(1, 0, 0), "warning")
    assert verdict.step == 1 and "embed and head" in verdict.summary and "config.tie_word_embeddings" in verdict.summary
    assert ask("untied-embeddings", tie(1)) is None and ask("untied-embeddings", tie(0, 1)) is None
    assert ask("untied-embeddings", tie(NAN)) is None
    assert "tying" in unexamined("untied-embeddings", chart(loss=[1.0]))


def test_dead_relu() -> None:
    def dead(*values: float, **note: Any) -> list[Reading]:
        return [read("dead_units", v, step, "ffn", units=64, **note) for step, v in enumerate(values)]

    alive = [read("dead_units", 0.1, step, "other") for step in range(3)]
    verdict = found("dead-relu", chart(dead_units=[*dead(0.2, 0.5, 0.9, 0.8), *alive]), "warning")
    assert verdict.step == 1 and verdict.where == "ffn" and "50% of 64 ReLU units" in verdict.summary and "1 of 2 layers" in verdict.summary
    assert ask("dead-relu", chart(dead_units=dead(0.9, 0.49, 0.9))) is None
    assert ask("dead-relu", chart(dead_units=dead(0.9, 0.9, 0.9, all_dead_so_far=0.2))) is None, "other units each time: sparse, not dead"
    assert unexamined("dead-relu", chart(dead_units=dead(0.89, 0.95)))
    assert unexamined("dead-relu", chart(dead_units=dead(0.89, 0.95, NAN)))
    assert found("dead-relu", chart(dead_units=dead(0.9)), "warning").certainty == "likely", "nearly all units: one batch is enough"


def test_data_repeats() -> None:
    id_ = "data-repeats"
    assert "4 of 5 steps" in found(id_, chart(batch_repeat=[0, 1, 1, 1, 1]), "warning").summary
    assert unexamined(id_, chart(batch_repeat=[0, 1, 1, 1]))
    assert "2.0 times in a row" in found(id_, chart(batch_repeat=[0, 1] * 6), "warning").summary
    assert "20.0 times" in found(id_, chart(batch_repeat=([0] + [1] * 19) * 5), "warning").summary
    assert ask(id_, chart(batch_repeat=[0] * 30)) is None
    assert ask(id_, chart(batch_repeat=[0, 0, 0, 0, 1, 4, 2, 7, 3, 5, 6, 2])) is None, "shuffled epochs of a small set"
    assert unexamined(id_, chart(batch_repeat=[NAN] * 6))


def test_data_repeats_where_later_steps_are_seldom_looked_at() -> None:
    def later(values: list[float], value: float) -> Chart:
        rare = [read("batch_repeat", value, step) for step in range(72, 4000, 8)]
        return chart(batch_repeat=[*(read("batch_repeat", v, step) for step, v in enumerate(values)), *rare])

    assert "63 of 64 steps" in found("data-repeats", later([0, *[1] * 63], 8), "warning").summary
    assert "2.0 times in a row" in found("data-repeats", later([0, 1] * 32, 0), "warning").summary
    assert ask("data-repeats", later([0] * 64, 0)) is None


def test_one_order_every_epoch() -> None:
    id_ = "data-repeats"
    assert "every 4 steps, 8 times" in found(id_, chart(batch_repeat=[0] * 4 + [4] * 8), "note").summary
    assert ask(id_, chart(batch_repeat=[0] * 4 + [4] * 7)) is None
    assert ask(id_, chart(batch_repeat=[0] * 3 + [3] * 30)) is None
    seen = [*range(64), *range(64, 250, 8)]
    back = {step: max((s for s in seen if s < step and (step - s) % 50 == 0), default=step) for step in seen}
    rare = [read("batch_repeat", step - back[step], step) for step in seen]
    assert "every 50 steps" in found(id_, chart(batch_repeat=rare), "note").summary
    assert ask(id_, chart(batch_repeat=[r for r in rare if r.step < 110])) is None, "one epoch and a little"


def test_steps_that_the_scaler_left_out_are_no_lost_updates() -> None:
    readings = [read("unmoved_share", 1.0, step, "head.weight", elements=10) for step in (2, 8, 20)]
    found("update-not-applied", chart(unmoved_share=readings), "critical")
    skipped = [read("skipped_step", step < 10, step) for step in range(21)]
    assert "1 sampled steps" in unexamined("update-not-applied", chart(unmoved_share=readings, skipped_step=skipped))
