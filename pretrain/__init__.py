"""pretrain: shards -> aligned encoders. Imports nothing of finetune or launch.

__main__.py     python -m pretrain CONFIG [key=value ...]: what every launcher starts
config.py       dataclass schema <- YAML <- key=value; registry.py finds components by file name
dist.py         the process group: rank, gather with gradient; agree.py: an error of one rank is raised on all
data/           shards in, batches out
towers/         encoders of one modality each; model.py joins them into a DualEncoder
losses/         what is minimised, without the B x B matrix where it is large
optim.py        parameter groups, schedules, weight averaging
objective.py    encode and loss apart; step.py: one optimizer step, plain or cached
strategies/     how a step runs on one or many processes
loop.py         fit(): the only training loop; stop.py: signals; meter.py, flops.py: how fast; runlog.py: what it says
launched.py     do the processes know each other; heartbeat.py: do they still live; oom.py: memory ran out
checkpoint.py   written atomically, verified, rotated; inference.py: loaded, ready to encode
recipe.py       the schema of a run, and its assembly; session.py: what all trainings share; start.py: what they start from
encode.py       batches -> embeddings; embed.py: of a split, in memory
embed_files.py  of whole collections, into files: collection.py (what is there), parquet.py, board.py (who does
                what), embed_options.py
export.py       a run as transformers, open_clip and onnxruntime load it; formats/: how they name and hold it, there and back
evaluate.py     retrieval.py, zero_shot.py, linear_probe.py: the figures
"""
