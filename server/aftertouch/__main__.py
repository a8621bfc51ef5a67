"""``python -m aftertouch`` is the ``aftertouch`` command; without what it needs it says so."""

import sys


def main() -> None:
    """Run the command line."""
    try:
        from aftertouch.cli import main as run

        run()
    except ModuleNotFoundError as error:
        sys.exit(f"aftertouch: {error.name} is missing: the command needs the extra [server], or [testing] for channel authors")


if __name__ == "__main__":
    main()
