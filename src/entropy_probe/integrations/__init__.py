"""Recorders for training libraries; each is imported only by those who use it."""
