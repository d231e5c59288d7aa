"""HeartBeat training: phantom, data, stages, loop, checkpoints, evaluation."""
