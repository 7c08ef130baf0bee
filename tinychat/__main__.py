"""`python -m tinychat` is the `tinychat` command."""

from tinychat.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
