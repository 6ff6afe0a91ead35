"""``python -m graphprune``: the command line."""

from graphprune.cli.main import main

if __name__ == "__main__":
    main()
