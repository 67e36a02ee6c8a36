"""The optimizer: its state, its metric η P, its own step, and that step's parts.

:mod:`~entropy_probe.optimizers.base` says what the probe needs of an optimizer, :mod:`~entropy_probe.optimizers.adam` answers
for Adam and AdamW, and :mod:`~entropy_probe.optimizers.geometry` is what dots of unit vectors are taken with. The formulas:
P in ``preconditioner``, the step in ``adamw_step``, its dependence on Ȳ in ``steps_of_others``, the errors of its parts in
``step_parts``, the weight of a fresh gradient in ``gradient_weights``.
"""
