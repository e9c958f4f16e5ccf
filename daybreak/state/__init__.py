"""What survives the process: checkpoints, metrics, the run folder."""
