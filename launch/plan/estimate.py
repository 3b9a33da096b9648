"""Memory and network traffic of one training step, from the sizes of a model and the way a strategy spreads them.

Legend: P = parameters, T = trainable parameters, W = processes, b = samples per process, B = b W, D = width of an embedding,
M = modalities. All sizes are in bytes; float32 = 4.
"""

from __future__ import annotations

from dataclasses import dataclass

from launch.plan.footprint import Footprint
from pretrain.losses import is_tiled, tiles
from pretrain.runtime import distributed
from pretrain.strategies.deepspeed import BUCKET_ELEMENTS
from pretrain.train import PretrainConfig

GIB = 2**30
OVERHEAD = 1.5 * GIB
"""CUDA's context, cuBLAS workspaces, NCCL's buffers and fragments of the allocator: a fixed allowance."""
USAGE = 0.4
"""Share of the peak that a well-fed GPU reaches, for the time estimate."""


@dataclass(frozen=True)
class ModelSize:
    """What an estimate needs to know about the model."""

    total: int
    """P."""
    trainable: int
    """T."""
    buffers: int
    """Bytes."""
    block: int
    """Parameters of the largest repeated layer."""
    root: int
    """Parameters outside of the repeated layers."""
    modalities: int
    footprint: Footprint
    """Activations."""
    flops: float
    """Forward and backward floating-point operations of a sample."""
    sample: int = 0
    """Bytes of the inputs and masks of one sample."""


@dataclass
class Estimate:
    """Memory and traffic of one GPU in one step."""

    strategy: str
    chunks: int
    share: int
    """b, samples per GPU."""
    memory: dict[str, int]
    """Bytes by part."""
    network: dict[str, int]
    """Bytes that each GPU sends per step, by kind."""
    flops: float
    """Floating-point operations per step and GPU, with the second forward pass of a cached step."""

    @property
    def total(self) -> int:
        """Bytes of memory."""
        return sum(self.memory.values())


def estimate(config: PretrainConfig, model: ModelSize, world: int, overhead: bool = True) -> Estimate:
    """Estimate one step of one process of `world`. overhead: count what only GPUs keep: CUDA, NCCL, batches."""
    train, word = config.train, config.train.strategy
    share = config.data.batch_size // world
    shards = world // train.replicas
    memory = {
        "weights": _weights(word, model, shards, train.precision) + model.buffers,
        "gradients": _gradients(word, model, shards, train.chunks),
        "optimizer": _optimizer(word, model, shards, train.offload),
        "average": _average(word, model, shards) if config.optim.average else 0,
        "activations": model.footprint.at(share // train.chunks),
        # That of this step, however many chunks it has, and the next one, which is copied meanwhile.
        "batches": 2 * share * model.sample if overhead else 0,
        "loss": _loss(config, model, share, world),
        "gathered features": _gathered(config, model, share, world),
        "CUDA and NCCL": round(OVERHEAD) if overhead else 0,
    }
    if word == "single":
        # Gradients appear while activations are freed: the peak is below the sum, and the optimizer step needs no activations.
        peak = max(model.footprint.at(share // train.chunks, gradients=True), memory["gradients"])
        memory["activations"] = peak - memory["gradients"]
    passes = 3 if train.chunks == 1 else 4
    return Estimate(
        strategy=word,
        chunks=train.chunks,
        share=share,
        memory=memory,
        network=_network(config, model, share, world),
        flops=model.flops * share * passes / 3,
    )


def _weights(word: str, model: ModelSize, shards: int, precision: str) -> int:
    if word == "fsdp2":  # shards, the root module unsharded, and two blocks gathered at a time
        low = 4 if precision == "fp32" else 2
        return 4 * model.total // shards + 4 * model.root + 2 * low * model.block
    if word == "zero3":  # shards twice (for the pass, and the master weights), and what is prefetched
        return (4 * model.total + 4 * model.trainable) // shards + 4 * min(model.total, 2 * BUCKET_ELEMENTS)
    master = 4 * model.trainable // shards if word.startswith("zero") else 0
    return 4 * model.total + master


def _gradients(word: str, model: ModelSize, shards: int, chunks: int) -> int:
    full = 4 * model.trainable
    if word in ("single", "ddp", "zero1") or (chunks > 1 and word != "single"):
        return full  # chunks accumulate before anything is sent, so every strategy holds full gradients
    if word == "fsdp2":  # the shard, and what waits to be reduced: the root's and two blocks'
        return full // shards + 4 * model.root + 8 * model.block
    if word == "zero3":  # the shard, a bucket of fixed size, and two copies of what it holds while it is reduced
        return full // shards + 4 * BUCKET_ELEMENTS + 8 * min(model.trainable, BUCKET_ELEMENTS)
    return full // shards + 4 * min(model.trainable, 2 * BUCKET_ELEMENTS)


def _optimizer(word: str, model: ModelSize, shards: int, offload: bool) -> int:
    if offload:
        return 0
    return 8 * model.trainable // (1 if word in ("single", "ddp") else shards)


def _average(word: str, model: ModelSize, shards: int) -> int:
    return 4 * model.trainable // (1 if word in ("single", "ddp") else shards)


def _loss(config: PretrainConfig, model: ModelSize, share: int, world: int) -> int:
    B, D, pairs = share * world, config.model.dim, model.modalities * (model.modalities - 1) // 2
    with distributed.assume_world(world, 1, True):
        tile = is_tiled(share, config.loss.tile) if hasattr(config.loss, "tile") else True
    if not tile:
        return pairs * 4 * 4 * share * B  # two directions, logits and their softmax
    side = getattr(config.loss, "tile", 0) or tiles.ACCELERATOR_SIDE
    return pairs * (2 * 4 * min(share, side) * min(B, side) + 4 * (share + B) * D)


def _gathered(config: PretrainConfig, model: ModelSize, share: int, world: int) -> int:
    """Features of this process and of all processes, with gradients of the same size; in a ring, of two more processes."""
    local = model.modalities * 4 * share * config.model.dim
    if getattr(config.loss, "exchange", "gather") == "ring":
        return 2 * local * (1 + min(2, world - 1))
    return 2 * local * (1 + world if world > 1 else 1)


def _network(config: PretrainConfig, model: ModelSize, share: int, world: int) -> dict[str, int]:
    """Bytes that one GPU sends: in a ring, an all-gather or reduce-scatter of n bytes sends n (W - 1) / W."""
    word, chunks, replicas = config.train.strategy, config.train.chunks, config.train.replicas
    ring, shards = (world - 1) / world, world // config.train.replicas
    shard_ring = (shards - 1) / shards
    low = 4 if config.train.precision == "fp32" else 2
    gathers = {"fsdp2": 2 if chunks == 1 else 3 * chunks, "zero3": 2 if chunks == 1 else 3 * chunks}.get(word, 0)
    bytes_per_gather = low * (model.total - model.root) + 4 * model.root if word == "fsdp2" else 4 * model.total
    weights = shard_ring * gathers * bytes_per_gather + (ring * 4 * model.trainable if word in ("zero1", "zero2") else 0)
    gradients = shard_ring * 4 * model.trainable * (2 if word in ("single", "ddp", "zero1") else 1)
    gradients += 2 * (replicas - 1) / replicas * 4 * model.trainable / shards  # the shards' mean over replicas
    if config.train.gradient_compression == "bf16":
        gradients /= 2
    if word == "zero1":
        gradients /= 2
    features = (
        world * share * config.model.dim * 4 * (model.modalities - 1 if share * share * world > 1 << 17 else model.modalities)
    )
    return {"gradients": round(gradients), "weights": round(weights), "features": round(2 * ring * features)}
