"""What the trainer's loss makes of every response token: ω on ∇log π and β on ∇H, from what the rows carry.

:mod:`~entropy_probe.losses.named` has the published losses by name, each a file beside it;
:mod:`~entropy_probe.losses.objective` adds masks, corrections, the KL term and the bonus,
:mod:`~entropy_probe.losses.length_weights` how a trainer averages and :mod:`~entropy_probe.losses.advantages` its advantages.
All are held to the trainers' own code by tests. Source: docs/method.md, section 4.
"""
