"""``python -m entropy_probe``: the same as the ``entropy-probe`` command."""

from entropy_probe.cli import main

main()
