"""What the trainer's loss makes of a response: its advantage and its weight."""
