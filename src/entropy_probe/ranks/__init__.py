"""Several processes that share the work: collectives, who holds what, same inputs, start and failure."""
