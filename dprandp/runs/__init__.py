"""A run on disk and on the terminal: its directory, table and ledger, checkpoints, files, messages, signals, ranks."""
