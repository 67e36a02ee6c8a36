"""The optimizer's state, its preconditioner, its own step and that step's parts."""
