"""What serves the training loop: processes, schedules, checkpoints, logs, hardware facts."""
