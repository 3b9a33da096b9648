"""How one step runs on one or many processes: a file a strategy."""
