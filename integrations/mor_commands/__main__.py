"""`python -m mor_commands` is `mor` where the package is on the path but not installed."""

from mor_commands import main

if __name__ == "__main__":
    main()
