"""Dumps of rollouts as training libraries write them, each layout one file, and their rows in our columns."""
