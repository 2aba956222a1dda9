"""Charts and checkups made by hand for the tests of the reports: an ordinary sick run, a hostile one, a healthy one."""

from __future__ import annotations

import math

from sickbay.core.chart import Chart, Reading
from sickbay.core.condition import Condition
from sickbay.core.diagnosis import Checkup, Diagnosis, Evidence
from sickbay.core.treatment import Treatment

DOC = """The gradient norm runs away.

Looks like
----------
The loss rises, then it is NaN.

Why
---
Each layer multiplies.
"""

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>[red]bold[/red]\"'`|&\u2028\u202e\x1b[31m\n{{7*7}}"


def known_conditions() -> dict[str, Condition]:
    """A small catalogue, so that these tests say nothing about the real one."""

    def row(id_: str, chapter: str, prescribes: tuple[str, ...] = (), leads_to: tuple[str, ...] = ()) -> Condition:
        return Condition(id_, "a symptom", (), lambda chart: None, prescribes, leads_to=leads_to, chapter=chapter, doc=DOC)

    rows = [
        row("exploding-gradients", "nan", ("clip-gradients",), ("non-finite-weights",)),
        row("non-finite-weights", "nan"),
        row("causal-leak", "bugs", ("fix-mask",)),
        row("padding-attended", "bugs"),
        row("data-repeats", "bugs"),
    ]
    return {condition.id: condition for condition in rows}


def known_treatments() -> dict[str, Treatment]:
    return {
        "clip-gradients": Treatment("clip-gradients", "changes-training", "clip the global gradient norm before the optimizer's step"),
        "fix-mask": Treatment("fix-mask", "advice", "pass is_causal=True"),
    }


def sick_chart(steps: int = 412, layers: int = 12) -> Chart:
    """A run whose gradients run away near its end."""
    readings = []
    for step in range(steps):
        runaway = math.exp(max(0, step - steps + 40) / 5)
        readings.append(Reading(step, "loss", 10.8 * math.exp(-step / 150) + 1.5 + 0.2 * math.sin(step) + (runaway - 1) / 200))
        readings.append(Reading(step, "grad_norm", (1.2 + 0.3 * math.cos(step * 1.7)) * runaway))
        readings.append(Reading(step, "learning_rate", 3e-3 * min(1, step / 50)))
        if step % 10 == 0:
            for layer in range(layers):
                for part in ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"):
                    value = runaway * (1 + layer / 4) * (0.1 + 0.02 * len(part))
                    readings.append(Reading(step, "param_grad_norm", value, f"transformer.h.{layer}.{part}"))
                    readings.append(Reading(step, "update_ratio", 1e-3 * (1 + layer / 6) * runaway**0.5, f"transformer.h.{layer}.{part}"))
    readings.append(Reading(steps, "loss", math.nan))
    readings.append(Reading(steps, "grad_norm", math.inf))
    facts = {
        "script": "train.py",
        "argv": ["--lr", "3e-3"],
        "started": "2026-01-02T03:04:05Z",
        "seconds": 41.2,
        "steps": steps,
        "exit_code": 1,
        "ended": "failed",
        "world_size": 1,
        "device": "cpu",
        "torch": "2.13.0",
        "overhead": {"share_of_step_time": 0.018, "how": "time inside hooks over wall time"},
    }
    return Chart(readings, facts)


def sick_checkup() -> Checkup:
    exploding = Diagnosis(
        summary="The gradient norm rose from a median of 1.2 to 18,400 within 40 steps and ended in NaN.",
        evidence=(
            Evidence(Reading(412, "grad_norm", 18400.0, source="train.py:88"), 10.0),
            Evidence(Reading(412, "grad_norm", math.inf), None, "grad_norm at the end"),
        ),
        severity="critical",
        step=400,
        where="transformer.h.3.attn.c_proj.weight",
        source="train.py:88",
        explains=("non-finite-weights",),
        condition="exploding-gradients",
        seconds=17.3,
        prescribes="clip-gradients",
    )
    leak = Diagnosis(
        summary="Changing token 5 changes the outputs before it.",
        evidence=(Evidence(Reading(1, "future_influence", 0.7, "transformer"), 1e-6),),
        severity="warning",
        step=1,
        certainty="likely",
        condition="causal-leak",
        prescribes="fix-mask",
    )
    return Checkup((exploding, leak), ("data-repeats",), {"padding-attended": "no padding was seen"})


def hostile_chart() -> Chart:
    """Every string that comes from the user's side is an attack on the medium that shows it."""
    readings = [Reading(step, "loss", 1.0 + step, HOSTILE, {"x": HOSTILE}) for step in range(3)]
    readings += [Reading(step, "param_grad_norm", 0.5, f"{HOSTILE}.{i}") for step in range(3) for i in range(3)]
    facts = {
        "script": HOSTILE,
        "argv": [HOSTILE, "caf\u00e9", "\udcff"],
        "ended": HOSTILE,
        "exit_code": 1,
        "device": HOSTILE,
        "problems": [HOSTILE, {"probe": HOSTILE}],
        "recording": HOSTILE,
        "seconds": float("nan"),
    }
    return Chart(readings, facts)


def hostile_checkup() -> Checkup:
    evil = Diagnosis(
        summary=HOSTILE * 3,
        evidence=(Evidence(Reading(2, "loss", math.nan, HOSTILE, source=HOSTILE), math.inf, HOSTILE),),
        severity="critical",
        step=2,
        where="module." * 200 + HOSTILE,
        source=HOSTILE,
        condition="exploding-gradients",
        prescribes="clip-gradients",
    )
    return Checkup((evil,), (), {"padding-attended": HOSTILE})


def healthy_checkup() -> Checkup:
    return Checkup((), ("causal-leak", "data-repeats"), {"padding-attended": "no padding was seen"})
