"""The run folder: checkpoints, resume, logs, TensorBoard, profiler, verification."""
