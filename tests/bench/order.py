"""Measures time to the first batch and memory of the sample order, for 1e9 samples in 1e5 shards.

    python -m tests.bench.order

The counts of samples are simulated. Prints one JSON line: times in seconds, memory in MB above what the imports need.
"""

import json
import resource
import time

import numpy as np

from pretrain.data.order import Order, ShardSource


def main() -> None:
    """Measure and print the figures."""
    imported = _read_peak_mb()
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
        "memory_mb": round(_read_peak_mb() - imported, 1),
        "process_mb": round(_read_peak_mb(), 1),
    }
    print(json.dumps(figures))


def _read_peak_mb() -> float:
    """Return the peak resident memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
