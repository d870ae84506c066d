"""The run: output folder, checkpoints, optimizer, metrics, processes, signals, HTTP."""
