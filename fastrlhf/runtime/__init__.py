"""What every run needs: options, metrics, checkpoints, whole files, optimizers, processes and shards."""
