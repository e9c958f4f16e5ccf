"""The state that survives the process: checkpoints, metrics, the run folder."""
