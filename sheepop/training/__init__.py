"""The loop and what it needs: schedule, optimizer, loss, checkpoints, metrics, processes."""
