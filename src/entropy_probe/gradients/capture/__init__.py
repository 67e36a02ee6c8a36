"""How a use of a weight tells sequences apart."""
