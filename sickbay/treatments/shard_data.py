"""Each rank is fed its own share of the samples.

Advice: `DataLoader(data, sampler=DistributedSampler(data), batch_size=...)` without `shuffle=True`, and `sampler.set_epoch(epoch)`;
where positions are drawn at random, seed the generator with `seed + rank`; in an iterable data set take every world-size-th sample
from the rank on.
"""

from __future__ import annotations

from sickbay.core.treatment import Treatment

treatment = Treatment(
    id="shard-data",
    safety="advice",
    summary="Give each rank its own share: DistributedSampler, or a random generator seeded with seed + rank.",
)
