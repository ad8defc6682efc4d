# PYTHON_ARGCOMPLETE_OK
"""`python -m mor_tools.commands` is `mor` if the package is on the path but not installed."""

from mor_tools.commands import main

if __name__ == "__main__":
    main()
