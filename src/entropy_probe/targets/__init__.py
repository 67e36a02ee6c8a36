"""What the probe differentiates, one a file: entropy by score or Rao-Blackwell, per response or per token; reward; length.

:mod:`~entropy_probe.targets.base` is the interface, :mod:`~entropy_probe.targets.registry` the list.
"""
