"""`python -m modelopt` is the command `modelopt`."""

from modelopt.cli import main

if __name__ == "__main__":
    main()
