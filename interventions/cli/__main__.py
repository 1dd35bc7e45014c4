"""`python -m interventions.cli`: the command `sparse-bridges`."""

from interventions.cli.main import main

if __name__ == "__main__":
    main()
