"""``python -m fedkd``: the same as the command ``fedkd``."""

from fedkd.cli import main

if __name__ == "__main__":
    main()
