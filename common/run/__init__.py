"""How a program runs: flags, process group, training loop, checkpoints, logs. Imports no other room."""
