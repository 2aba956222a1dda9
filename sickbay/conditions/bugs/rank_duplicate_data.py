"""Several ranks train on the very same batches: the run costs as many processes as it has and learns as much as one.

Looks like
    Nothing: loss and gradients are those of a healthy run on one rank. Throughput is counted several times over, an epoch takes as long
    on eight ranks as on one, and the batch is as small as a single rank's.

Why
    A DataLoader with shuffle=True and one seed on all ranks instead of a DistributedSampler, a sampler made with a fixed rank, an
    iterable data set that ignores the rank, or random positions drawn from a generator that is seeded alike everywhere.

Tell apart
    Ranks that split one model (tensor or pipeline parallelism) are fed the same batch by design: this is asked only where gradients are
    averaged over all ranks. Full-batch training and one batch fitted on purpose repeat over the steps too. data-repeats is about time.

Cure
    DistributedSampler(data) with set_epoch, seed + rank for random positions, every world-size-th sample of a stream from the rank on.

Sources
    Li et al. 2020, arXiv 2006.15704, section 3.1 (each replica has its own input); PyTorch documentation, `DistributedSampler` and
    `IterableDataset` ("each replica ... duplicate data").
"""

from __future__ import annotations

from sickbay.core.chart import Chart, Reading
from sickbay.core.condition import Condition
from sickbay.core.diagnosis import Diagnosis, Evidence, NotExamined, Threshold

SAME = Threshold(0.9, "share of steps", source="shards drawn apart share whole batches in no step, whatever the size of the set")
STEPS = Threshold(4, "steps", source="equal first batches may be a test of the loop; four different ones in a row are the data's order")
VARIED = Threshold(3, "batches", source="one or two batches for ever are a full batch, or a batch fitted on purpose, on every rank")


def diagnose(chart: Chart) -> Diagnosis | NotExamined | None:
    """The share of steps whose batch is the same one on two ranks, where the ranks are replicas of one model."""
    steps: dict[int, dict[int, Reading]] = {}
    for mark in chart["rank_batch"]:
        steps.setdefault(mark.step, {})[int(mark.note.get("rank", 0))] = mark
    pairs = [ranks for _, ranks in sorted(steps.items()) if len(ranks) > 1]
    if len(pairs) < STEPS:
        return NotExamined(f"the batches of {len(pairs)} steps were marked on more than one rank; this needs {STEPS:.0f}")
    by = next((str(mark.note["by"]) for mark in chart["rank_weights"] if mark.note.get("by")), "")
    if not by:
        return NotExamined("nothing shows that the ranks are replicas: ranks that split one model are fed the same batch")
    shared = [ranks for ranks in pairs if len({mark.value for mark in ranks.values()}) < len(ranks)]
    if len({mark.value for ranks in pairs for mark in ranks.values()}) < VARIED or len(shared) < SAME * len(pairs):
        return None
    first = shared[0]
    alike = [rank for rank, mark in first.items() if sum(mark.value == other.value for other in first.values()) > 1]
    share = Reading(first[alike[0]].step, "rank_batch", len(shared) / len(pairs), source=first[alike[0]].source)
    text = f"In {len(shared)} of {len(pairs)} marked steps ranks {', '.join(map(str, sorted(alike)))} trained on the very same batch"
    summary = f"{text}: of {len(first)} ranks' work {len(alike) - 1} is done twice (replicas by {by})."
    evidence = (Evidence(share, SAME, label="share of steps"), *(Evidence(first[rank], label=f"rank {rank}") for rank in sorted(alike)[:2]))
    return Diagnosis(summary, evidence, "critical", share.step, "", share.source, seconds=first[alike[0]].seconds)


condition = Condition(
    id="rank-duplicate-data",
    symptom="several ranks of a data-parallel run train on the same batches",
    needs=("rank_batch", "rank_weights"),
    diagnose=diagnose,
    prescribes=("shard-data",),
)
