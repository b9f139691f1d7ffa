"""The training loop and everything it calls: step, evaluation, resume, logs."""
