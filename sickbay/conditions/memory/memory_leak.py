"""Memory grows with every step, because a variable of the script keeps the graphs or tensors of steps that are over.

Looks like
    The process (or the GPU's allocator) needs more memory every step until allocation fails, hours into the run; steps slow down as the
    chain of kept graphs grows. Loss and gradients look right.

Why
    A loss or output that still has its graph is added to a total, appended to a list, put into a cache or stored by a hook: the graph, and
    with it whatever it keeps for backward, lives as long as that variable. retain_graph=True and create_graph=True keep the activations
    too. Detached outputs of every step in a list grow as well, only slower.

Tell apart
    A buffer with a bound (deque(maxlen=...), a cleared list), a data set's cache in the first epoch, floats from .item() and an optimizer's
    state after the first step all grow and then stop. out-of-memory at once, with no growth before, is not a leak.

Cure
    Keep numbers: loss.item(), or loss.detach() where a sync would cost; detach and move outputs to the host before storing them; bound the
    container; clear what hooks store at every step; no retain_graph where one backward is all there is.

Sources
    PyTorch documentation, FAQ "My model reports cuda runtime error(2): out of memory" (don't accumulate history across your training loop);
    packnet-sfm issue 47, brax pull request 152, labelmodels issue 4, ray issue 40940.
"""

from __future__ import annotations

from typing import Any

from sickbay.core.chart import Chart, Reading
from sickbay.core.condition import Condition
from sickbay.core.diagnosis import Diagnosis, Evidence, NotExamined, Threshold, number

KEPT = Threshold(10, "steps", source="no training loop needs the graph of a step that is ten steps past: unrolled losses span one step")
RESET = Threshold(
    30, "steps", source="a running mean that is reset for the log every 10 or 20 steps keeps fewer: a bounded cost, not a leak"
)
MINE = Threshold(0.5, "share of growth", source="a container explains the growth of memory when it gained at least half of it")
MEBIBYTE = 1 << 20  # bytes


def diagnose(chart: Chart) -> Diagnosis | NotExamined | None:
    """Graphs of ten earlier steps in a row are alive, or memory grows steadily and one container without bound gains most of it."""
    holders = chart["memory_holder"]
    graphs = [r for r in holders if r.note.get("kind") == "graph" and r.value >= KEPT]
    if graphs:
        return _graphs(chart, graphs[-1])
    grown = [r for r in holders if r.note.get("kind") == "tensors" and r.note.get("whole") and not r.note.get("drops")]
    grown = [r for r in grown if r.note.get("bytes", 0) >= MINE * r.note.get("growth", float("inf")) or _keeps_graphs(r)]
    if grown:
        return _tensors(chart, grown[-1])
    return None if chart["kept_graphs"].finite() else NotExamined("no step was seen to end")


def _keeps_graphs(holder: Reading) -> bool:
    """True if all that was gained has the graph that made it: of steps that are over nobody needs one, however small."""
    return float(holder.note.get("graphs") or 0) >= max(holder.value, KEPT)


def _graphs(chart: Chart, holder: Reading) -> Diagnosis:
    note, most = holder.note, chart["kept_graphs"].finite().worst() or holder
    path, size = note.get("path") or "", float(note.get("bytes") or 0)
    who = f"`{path}` ({note.get('type')})" if path else "something no variable of the script leads to"
    does = "is one ever longer graph through" if note.get("chain") else "keeps the autograd graphs of"
    what = "with all activations" if size and note.get("freed") is False else "activations already freed" if note.get("freed") else ""
    cost = f", {number(size / MEBIBYTE)} MiB a step" if size >= MEBIBYTE / 10 else ""
    also = f"; so does {', '.join(f'`{other}`' for other in note.get('others', ()))}" if note.get("others") else ""
    text = f"{who} {does} {int(holder.value)} steps that are over{f' ({what}{cost})' if what else cost}{also}."
    grave = note.get("freed") is False and size > 0
    bounded = note.get("bounded") or (note.get("drops") and most.value < RESET)
    return Diagnosis(
        text,
        (Evidence(most, KEPT), *_growth(chart, holder)),
        "note" if bounded else "critical" if grave else "warning",
        holder.step,
        path,
        holder.source,
        "confirmed" if path else "likely",
        seconds=holder.seconds,
    )


def _tensors(chart: Chart, holder: Reading) -> Diagnosis:
    note = holder.note
    size = number(float(note["bytes"]) / MEBIBYTE)
    others = f" and {note['others']} like it" if note.get("others") else ""
    graphs = ", each with the graph that made it" if _keeps_graphs(holder) else ""
    text = (
        f"`{note['path']}` ({note['type']}){others} gained {int(holder.value)} tensors in {note['steps']} steps{graphs}, "
        f"{size} MiB a step, and nothing in the script ever shortens it."
    )
    evidence = _growth(chart, holder) or (Evidence(holder, 0.0),)
    return Diagnosis(text, evidence, "warning", holder.step, note["path"], holder.source, "likely", seconds=holder.seconds)


def _growth(chart: Chart, holder: Reading) -> tuple[Evidence, ...]:
    """The memory in use when the holder was named, against what it was at first."""
    used = [r for r in chart["resident_memory"].finite() if r.step <= holder.step]
    return (Evidence(used[-1], used[0].value, "memory in use"),) if len(used) > 1 and used[-1].value > used[0].value else ()


def inject(case: Any) -> Any:
    """A list keeps each step's loss with its graph, and backward is told to retain it."""
    history: list[Any] = []

    def backward(case: Any, loss: Any) -> None:
        (loss / case.accumulation).backward(retain_graph=True)
        history.append(loss)

    return case.but(backward=backward)


condition = Condition(
    id="memory-leak",
    symptom="memory grows every step: a variable keeps the graphs or tensors of steps that are over",
    needs=("kept_graphs",),
    uses=("memory_holder", "resident_memory"),
    diagnose=diagnose,
    prescribes=("detach-history",),
    leads_to=("out-of-memory",),
    inject=inject,
)
