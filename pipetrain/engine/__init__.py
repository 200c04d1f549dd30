"""Runs one rank's part of a schedule. Knows schedules and tensors; nothing of models, data or settings."""
