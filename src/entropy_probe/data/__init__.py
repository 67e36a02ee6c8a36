"""What was sampled: rollouts, how they are paired, the bundled run."""
