"""What surrounds the loop of a run: checkpoints, the run folder, logs, schedules, evaluation, memory."""
