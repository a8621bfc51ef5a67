"""``python -m aftertouch`` is the ``aftertouch`` command."""

from aftertouch.cli import main

main()
