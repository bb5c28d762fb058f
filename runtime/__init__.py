"""The parts around the training loop: processes, schedules, checkpoints, logs, hardware facts."""
