"""Tests of the order of samples: against slow formulas, and as properties of any order."""

import hashlib
import pickle
from collections import Counter
from itertools import accumulate
from math import gcd, lcm

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.order import STREAMS, Order, ShardSource, choose_streams
from pretrain.data.shuffle import KeyedGenerator, permutation, philox_key
from pretrain.errors import ConfigError

counts = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(lambda c: sum(c) > 0)
weights = st.floats(0.01, 10, allow_nan=False)
seeds = st.integers(0, 2**40)
NEVER = st.just(False)


@st.composite
def orders(draw, max_sources=3, replacement=NEVER):
    """Draw arguments of an Order that is not refused."""
    sources = [ShardSource(c, draw(weights)) for c in draw(st.lists(counts, min_size=1, max_size=max_sources))]
    streams = draw(st.integers(1, min(4, *(sum(s.counts) for s in sources), 4)))
    block = draw(st.integers(0, min(sum(s.counts) for s in sources) // streams))
    return {
        "sources": sources,
        "seed": draw(seeds),
        "window": draw(st.integers(1, 5)),
        "streams": streams,
        "block": block,
        "replacement": draw(replacement),
    }


def triples(locations):
    """Return SampleLocations as [(source, shard, sample)]."""
    return list(zip(*(column.tolist() for column in locations), strict=True))


# ---- a literal transcription of the formulas -------------------------------------------------------------------------


def slow_words(n, *purpose):
    digest = hashlib.blake2b("/".join(str(part) for part in purpose).encode(), digest_size=16).digest()
    generator = np.random.Philox(key=int.from_bytes(digest, "little"))
    return [int(generator.random_raw()) for _ in range(n)]


def slow_permutation(n, *purpose):
    words = [word >> max(n - 1, 0).bit_length() for word in slow_words(n, *purpose)]
    return sorted(range(n), key=lambda i: words[i])  # Python's sort is stable


def slow_sequence(counts, seed, source, window, length):
    """Return the first `length` elements of the sequence of one source, epoch by epoch."""
    elements, epoch = [], 0
    while len(elements) < length:
        shards = slow_permutation(len(counts), seed, source, "shards", epoch)
        for w in range(0, len(shards), window):
            window_samples = [(shard, i) for shard in shards[w : w + window] for i in range(counts[shard])]
            order = slow_permutation(len(window_samples), seed, source, "samples", epoch, w // window)
            elements += [window_samples[i] for i in order]
        epoch += 1
    return elements[:length]


def slow_order(sources, seed, window, streams, block, length, shares):
    """Return the first `length` samples: select a source by reversed bits, apply the streams rule."""
    C, selections, samples = streams, [0] * len(sources), []
    sizes = [sum(s.counts) for s in sources]
    blocks = [block or max(1, min(round(n / -(-len(s.counts) // window)), n // C)) for n, s in zip(sizes, sources, strict=True)]
    sequence_length = length + C * max(blocks)
    sequences = [slow_sequence(s.counts, seed, i, window, sequence_length) for i, s in enumerate(sources)]
    for t in range(-(-length // C)):
        point = int(format(t % 2**16, "016b")[::-1], 2)
        source = next(i for i, end in enumerate(accumulate(shares)) if point < end)
        j, m = selections[source], blocks[source]
        selections[source] += 1
        for c in range(C):
            b, rest = divmod(j * C + c, C * m)  # p' = bCm + kC + c
            k = rest // C
            samples.append((source, *sequences[source][b * C * m + c * m + k]))
    return samples[:length]


@given(orders())
@settings(max_examples=40, deadline=None)
def test_agrees_with_the_slow_transcription(arguments):
    order = Order(**arguments)
    length = 150
    assert triples(order.locate(np.arange(length))) == slow_order(
        **{k: v for k, v in arguments.items() if k != "replacement"}, length=length, shares=order._shares.tolist()
    )


# ---- properties ------------------------------------------------------------------------------------------------------


@given(orders(max_sources=1), st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_each_sample_once_per_epoch(arguments, epochs):
    arguments |= {"streams": 1}
    (source,), order = arguments["sources"], Order(**arguments)
    n = order.epoch_size
    all_samples = {(0, i, k) for i, count in enumerate(source.counts) for k in range(count)}
    for epoch in range(epochs):
        assert set(triples(order.locate(np.arange(epoch * n, (epoch + 1) * n)))) == all_samples


@given(orders(), st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_each_sample_once_per_epoch_of_its_source_with_streams_and_weights(arguments, blocks):
    """Whole blocks of all streams are a contiguous beginning of each source's sequence."""
    order = Order(**arguments)
    samples_of = [[] for _ in order.sources]
    for source, shard, sample in triples(order.locate(np.arange(blocks * 100 * order.streams))):
        samples_of[source].append((shard, sample))
    for i, source in enumerate(order.sources):
        stripe = order.streams * int(order._blocks[i])  # a block of each stream
        n = len(samples_of[i]) // stripe * stripe
        full, rest = divmod(n, sum(source.counts))
        times = Counter(samples_of[i][:n])
        assert set(times.values()) <= {full, full + 1}
        assert sum(v == full + 1 for v in times.values()) == (rest if full else len(times))


@given(orders(replacement=st.booleans()), st.lists(st.integers(0, 10**12), min_size=1, max_size=30))
@settings(max_examples=40, deadline=None)
def test_any_position_can_be_looked_up_alone(arguments, positions):
    order, other = Order(**arguments), Order(**arguments)
    assert [triples(order.locate(p))[0] for p in positions] == triples(other.locate(positions))


def test_sequential_and_random_access_agree():
    order = Order([ShardSource([50] * 30, 2), ShardSource([7, 90, 4])], seed=3, window=4, streams=2)
    expected = triples(order.locate(np.arange(3000)))
    shuffled = np.random.default_rng(0).permutation(3000)
    assert triples(order.locate(shuffled)) == [expected[p] for p in shuffled]
    copy = pickle.loads(pickle.dumps(order))
    assert triples(copy.locate(np.arange(3000))) == expected
    assert copy.digest() == order.digest()


@given(
    nodes=st.integers(1, 4),
    per_node=st.integers(1, 4),
    streams=st.integers(1, 3),
    share=st.integers(1, 3),
    batch=st.integers(0, 10**6),
)
@settings(max_examples=60, deadline=None)
def test_a_batch_is_the_same_for_any_number_of_processes(nodes, per_node, streams, share, batch):
    world, c = nodes * per_node, nodes * streams
    size = world * c * share
    order = Order([ShardSource([1000] * 9)], seed=0, window=2, streams=c)
    order.check(size, world, nodes)
    served = [order.positions(batch, size, rank, world, nodes) for rank in range(world)]
    assert sorted(np.concatenate(served).tolist()) == list(range(batch * size, (batch + 1) * size))
    assert all(len(positions) == size // world and (np.diff(positions) > 0).all() for positions in served)
    for rank, positions in enumerate(served):  # a node serves its own streams
        assert c == 1 or set(positions % c // streams) == {rank // per_node}


@given(st.lists(weights, min_size=1, max_size=5), st.integers(1, 300_000))
@settings(max_examples=40, deadline=None)
def test_every_beginning_has_each_source_in_proportion_to_its_weight(w, length):
    """n van der Corput points miss an expected count by at most log2(n) / 3 + 1 (Béjian, Faure 1977)."""
    order = Order([ShardSource([5] * 3, x) for x in w], seed=0)
    source, _ = order._map_to_sources(np.arange(length))
    bound = np.log2(length) / 3 + 1
    for i, x in enumerate(w):
        exact = order._shares[i] / 2**16
        assert abs(exact - x / sum(w)) <= 1 / 2**16
        assert abs(np.count_nonzero(source == i) - exact * length) <= bound
        assert np.abs(np.cumsum(source == i) - exact * np.arange(1, length + 1)).max() <= bound


def test_with_streams_each_node_reads_its_own_shards():
    """With blocks as large as windows, a node reads about 1/nodes of the shards of any part of the run."""
    order = Order([ShardSource([100] * 64)], seed=1, window=4, streams=4)
    served = [np.concatenate([order.positions(g, 64, n, 4, 4) for g in range(25)]) for n in range(4)]
    shards = [set(order.locate(p).shard.tolist()) for p in served]
    assert [len(node_shards) for node_shards in shards] == [4] * 4
    assert len(set.union(*shards)) == 16


def test_chosen_streams_divide_the_shards_and_keep_the_sequence_for_all_numbers_of_nodes():
    """The sequence is that of one node, and the nodes' shards do not overlap. The choice does not depend on the nodes."""
    batch_size, shards, samples = 96, 96, 40
    sequences, read = {}, {}
    for nodes in (1, 2, 3, 4, 6):
        streams, window = choose_streams(16, batch_size, shards, nodes)
        assert (streams, window) == (STREAMS, 1)
        order = Order([ShardSource([samples] * shards)], seed=1, window=window, streams=streams)
        steps = range(STREAMS * samples // batch_size)  # a block of each stream
        served = [[order.positions(g, batch_size, n, nodes, nodes) for g in steps] for n in range(nodes)]
        merged = [np.sort(np.concatenate(parts)) for parts in zip(*served, strict=True)]
        sequences[nodes] = triples(order.locate(np.concatenate(merged)))
        read[nodes] = [set(order.locate(np.concatenate(positions)).shard.tolist()) for positions in served]
    assert all(sequence == sequences[1] for sequence in sequences.values())
    assert {nodes: [len(s) for s in sets] for nodes, sets in read.items()} == {n: [STREAMS // n] * n for n in read}
    assert all(len(set.union(*sets)) == STREAMS for sets in read.values())


@given(st.integers(1, 40), st.integers(1, 5000), st.integers(1, 300), st.integers(1, 70))
@settings(max_examples=200, deadline=None)
def test_chosen_streams_are_never_refused(window, batch_size, shards, nodes):
    streams, chosen = choose_streams(window, batch_size, shards, nodes)
    order = Order([ShardSource([50] * shards)], seed=0, window=chosen, streams=streams)
    if batch_size % nodes == 0 and batch_size <= order.epoch_size:
        order.check(batch_size, nodes, nodes)
    assert streams == 1 or (window <= streams * chosen < window + streams and streams * chosen <= shards)
    if streams == 1:
        assert chosen == window


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 3), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_nodes_that_do_not_divide_the_streams_share_as_few_as_they_can(streams, nodes, per_node, batch):
    world, size = nodes * per_node, lcm(streams, nodes) * nodes * per_node
    order = Order([ShardSource([1000] * 90)], seed=0, window=2, streams=streams)
    order.check(size, world, nodes)
    served = [order.positions(batch, size, rank, world, nodes) for rank in range(world)]
    assert sorted(np.concatenate(served).tolist()) == list(range(batch * size, (batch + 1) * size))
    of_nodes = [set((np.concatenate(served[n * per_node : (n + 1) * per_node]) % streams).tolist()) for n in range(nodes)]
    assert {len(s) for s in of_nodes} == {streams // gcd(streams, nodes)} == {order.node_streams(nodes)}


def test_epochs_and_seeds_differ():
    n = 2000
    order = Order([ShardSource([100] * 20)], seed=0, window=4)
    first, second = triples(order.locate(np.arange(n))), triples(order.locate(np.arange(n, 2 * n)))
    other = triples(Order([ShardSource([100] * 20)], seed=1, window=4).locate(np.arange(n)))
    assert sum(a == b for a, b in zip(first, second, strict=True)) < 20
    assert sum(a == b for a, b in zip(first, other, strict=True)) < 20


def test_the_keyed_generator_is_philox_with_that_key():
    generator = KeyedGenerator()
    for words in ((1, "sample", 5, "image"), (1, "sample", 6, "image"), (1, "sample", 5, "image")):
        ours, fresh = generator.rekey(*words), np.random.Generator(np.random.Philox(key=philox_key(*words)))
        for draw in ("random", "standard_normal"):
            assert getattr(ours, draw)() == getattr(fresh, draw)()
        assert ours.integers(2**20, dtype=np.uint32) == fresh.integers(
            2**20, dtype=np.uint32
        )  # leaves half a 64-bit word unused


def test_permutations_are_uniform():
    """The 24 orders of 4 items are equally frequent: chi-square, 23 degrees of freedom, p = 1e-4."""
    times = Counter(tuple(permutation(4, "test", i).tolist()) for i in range(4800))
    assert len(times) == 24
    assert sum((n - 200) ** 2 / 200 for n in times.values()) < 55.0


def test_with_replacement_every_sample_is_equally_probable():
    counts = [1, 0, 9, 40]
    order = Order([ShardSource(counts)], seed=5, window=2, replacement=True)
    n = 200_000
    times = Counter(triples(order.locate(np.arange(n))))
    assert set(times) == {(0, i, k) for i, c in enumerate(counts) for k in range(c)}
    # draws share windows of 25 and vary more than independent ones: a frequency of 1/50 each, within a tenth
    assert all(abs(v / n - 1 / 50) < 0.002 for v in times.values())


# ---- substitutes -----------------------------------------------------------------------------------------------------


@given(orders(replacement=st.booleans()), st.integers(0, 10**6), st.integers(0, 50))
@settings(max_examples=60, deadline=None)
def test_a_substitute_is_another_sample_of_the_window(arguments, position, attempt):
    order = Order(**arguments)
    original = triples(order.locate(position))[0]
    source, shard, sample = order.substitute(position, attempt)
    assert (source, shard, sample) == Order(**arguments).substitute(position, attempt)
    assert source == original[0]
    assert 0 <= sample < order.sources[source].counts[shard]
    sequence = order._sequences[source]
    _, q = order._map_to_sources(np.array([position]))
    ((_, window_id, _),) = sequence._group_by_window(q)
    window = sequence._window(window_id)
    assert shard in window.shards
    if not arguments["replacement"] and window.starts[-1] > 1:
        assert (source, shard, sample) != original


def test_attempts_reach_all_other_samples_of_the_window():
    order = Order([ShardSource([3, 4])], seed=0, window=2)
    original = triples(order.locate(5))[0]
    assert {order.substitute(5, a) for a in range(200)} == {(0, i, k) for i, c in enumerate([3, 4]) for k in range(c)} - {
        original
    }


# ---- digests that must never change ----------------------------------------------------------------------------------

GOLDEN = {
    "plain": ({"sources": [ShardSource([100] * 50)], "seed": 0}, "411f8a108e872f71"),
    "uneven": ({"sources": [ShardSource(list(range(60)))], "seed": 1, "window": 7}, "0dfec14615b7faf9"),
    "weighted": ({"sources": [ShardSource([100] * 50, 3), ShardSource([10, 20, 30], 1)], "seed": 2**33}, "285f4464d0a3afed"),
    "streams": (
        {"sources": [ShardSource([100] * 50, 1), ShardSource([500] * 9, 0.3)], "seed": 2, "streams": 4},
        "aa478f4572fd2c5f",
    ),
    "blocks": ({"sources": [ShardSource([100] * 50)], "seed": 2, "streams": 8, "block": 13}, "e52b898ce62429a7"),
    "replacement": ({"sources": [ShardSource(list(range(60)))], "seed": 3, "replacement": True}, "e4040bc143c01516"),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name):
    """If a digest changes, runs started before cannot be resumed."""
    arguments, digest = GOLDEN[name]
    order = Order(**arguments)
    locations = np.stack(order.locate(np.arange(12_345))).astype("<i8")
    substitutes = np.array([order.substitute(p, a) for p in (0, 99, 5000) for a in range(3)], dtype="<i8")
    assert hashlib.blake2b(locations.tobytes() + substitutes.tobytes(), digest_size=8).hexdigest() == digest


# ---- invalid arguments -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sources": []}, "names no source"),
        ({"sources": [ShardSource([0, 0])]}, "source 0 of data.train holds no samples"),
        ({"sources": [ShardSource([5]), ShardSource([])]}, "source 1 of data.train holds no samples"),
        ({"sources": [ShardSource([5], 0.0), ShardSource([5])]}, "weight 0.0 of source 0 must be a positive number"),
        ({"sources": [ShardSource([5], float("nan"))]}, "weight nan of source 0"),
        ({"sources": [ShardSource([5], 1), ShardSource([5], 1e-6)]}, "weight 1e-06 of source 1 is less than 1/65536"),
        ({"sources": [ShardSource([5])], "window": 0}, "data.window=0"),
        ({"sources": [ShardSource([5])], "streams": 0}, "data.streams=0"),
        ({"sources": [ShardSource([10])], "streams": 4, "block": 3}, "enough for blocks of at most 2"),
        ({"sources": [ShardSource([2**30] * 3)], "window": 3}, "permuted together"),
    ],
)
def test_refused(arguments, message):
    with pytest.raises(ConfigError, match=message) as e:
        Order(**({"seed": 0} | arguments))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("batch_size", "world", "nodes", "message"),
    [
        (24, 5, 1, "cannot be divided among 5 processes: use a multiple of 5"),
        (22, 1, 1, "cannot be divided among data.streams=4: use a multiple of 4"),
        (24, 6, 4, "6 processes on 4 nodes"),
        (104, 1, 1, "data.batch_size=104 is more than data.train holds: a batch can have at most its 100 samples"),
        (0, 1, 1, "at least 1 sample"),
    ],
)
def test_batches_refused(batch_size, world, nodes, message):
    order = Order([ShardSource([20] * 5)], seed=0, window=1, streams=4)
    with pytest.raises(ConfigError, match=message):
        order.check(batch_size, world, nodes)


def test_steps_of_epochs():
    order = Order([ShardSource([20] * 5)], seed=0)
    assert [order.steps(e, 32) for e in (1, 2, 0.5, 8)] == [4, 7, 2, 25]
    assert order.steps(0.1, 10) == 1  # 0.1 means one tenth, not the float slightly above it


def test_the_digest_differs_for_other_data_or_order():
    base = {"sources": [ShardSource([20] * 5), ShardSource([3, 4])], "seed": 0, "window": 2}
    variants = [
        base,
        base | {"seed": 1},
        base | {"window": 3},
        base | {"replacement": True},
        base | {"streams": 2},
        base | {"sources": [ShardSource([20] * 5), ShardSource([4, 3])]},
        base | {"sources": [ShardSource([20] * 5, 2), ShardSource([3, 4])]},
    ]
    assert len({Order(**arguments).digest() for arguments in variants}) == len(variants)
