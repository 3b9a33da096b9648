"""pretrain: shards -> aligned encoders."""
