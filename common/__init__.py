"""Shared, thin: data, launch, engine, checkpoints, costs, speed and the ledger; part of no paper's claim."""
