"""What a step did: realised changes, sweeps of the learning rate, fresh responses after it."""
