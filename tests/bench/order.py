"""Time to the first batch of positions, and memory, for a billion samples in a hundred thousand shards.

    python -m tests.bench.order

Counts are simulated. Prints one JSON line; times in seconds, memory in MB over what the imports took.
"""

import json
import resource
import time

import numpy as np

from pretrain.data.order import Order, ShardSource


def main() -> None:
    """Measure and print."""
    imported = _peak_mb()
    counts = np.full(100_000, 10_000)
    start = time.perf_counter()
    order = Order([ShardSource(counts)], seed=0)
    order.locate(order.positions(0, 32_768))
    first = time.perf_counter() - start

    start = time.perf_counter()
    for batch in range(1, 41):
        order.locate(order.positions(batch, 32_768))
    later = (time.perf_counter() - start) / 40
    figures = {
        "bench": "order",
        "samples": order.epoch_size,
        "shards": len(counts),
        "batch_size": 32_768,
        "first_batch_seconds": round(first, 4),
        "later_batch_seconds": round(later, 4),
        "memory_mb": round(_peak_mb() - imported, 1),
        "process_mb": round(_peak_mb(), 1),
    }
    print(json.dumps(figures))


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
