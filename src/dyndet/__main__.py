"""`python -m dyndet COMMAND ...`, the same as `dyndet COMMAND ...`."""

from dyndet.cli.door import main

if __name__ == "__main__":
    main()
