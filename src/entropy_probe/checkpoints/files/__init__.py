"""Kinds of files that checkpoints are made of, each opened without reading a tensor; which folder holds which, formats know."""
