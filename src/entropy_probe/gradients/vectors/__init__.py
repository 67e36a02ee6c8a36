"""Where gradients go: unit vectors, shards of them, contractions with directions."""
