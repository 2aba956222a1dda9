"""Each epoch delivers every batch once, in an order of its own.

Advice: seed before the loop only; `for batch in loader` instead of next(iter(loader)); shuffle=True; sampler.set_epoch(epoch) under DDP;
in an iterable data set take every num_workers-th sample from get_worker_info().id on.
"""

from __future__ import annotations

from sickbay.core.treatment import Treatment

treatment = Treatment(
    id="shuffle-data",
    safety="advice",
    summary="Shuffle anew each epoch: seed once, one iterator per epoch, set_epoch, a shard per worker.",
)
