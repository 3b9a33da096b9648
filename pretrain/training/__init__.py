"""One training run of either stage: the loop, its step, and the files and numbers that a run writes.

session.py      what both trainers share: agreement, run folder, encoders, loader, and the plan of the run
run_tokenizer.py  the tokenizer of a run that names none: trained on its captions, or the checkpoint's
dry_run.py      what --dry-run prints: settings that differ from the defaults, parameters, where the run would go
run_end.py      what a run prints at its end: figures of its evaluation, where it lies, the next commands
config.py       the `train` section of a configuration, and the plan of a run
stages.py       stages within one run (train.stages): sizes, batch and learning rate by step
loop.py         fit(), the only training loop: optimizer, schedule, logging, evaluation, saving and stopping
run_state.py    the state of a run, and how it is saved, restored and evaluated
saving.py       the saves of a run: one in flight, and failures that are counted alike on all ranks
trainer_state.py  the state of a run in a checkpoint, read and checked
step.py         one optimizer step, plain or cached (GradCache)
objective.py    the contract between the loop and what it trains, and the contrastive objective of pretraining
run_dir.py      the run folder: its lock, status.json and environment.json
metrics.py      metrics.jsonl, audit-RANK.jsonl and experiment trackers
replaced_samples.py  replaced-RANK.jsonl and replaced.tsv: replaced samples by reason and shard
spikes.py       loss spikes: found by a rolling median, logged, skipped, or undone by a rollback
rank_times.py   which process is slow, and whether it computes or waits for data
throughput.py   samples per second, data wait, memory and MFU between two log steps
profile.py      train.profile: a trace of some steps, and where their time goes (profile_summary.py)
flops.py        floating-point operations of a batch, for MFU

May import checkpoints, formats, model, strategies, data and what lies below them, but neither evaluation nor embedding.
"""
