"""Data sources, tasks, evaluation, batch-norm re-estimation and the training loop. Import from the modules."""
