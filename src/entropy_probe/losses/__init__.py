"""What the trainer's loss makes of a response: its advantage and its weight.

A probe uses :mod:`~entropy_probe.losses.advantages` and :mod:`~entropy_probe.losses.length_weights`: one weight a response.
:mod:`~entropy_probe.losses.objective` and the published losses beside it give weights a token, with ratios, masks, KL and
bonus. They are held to the trainers' own code by tests, and no probe uses them yet.
"""
