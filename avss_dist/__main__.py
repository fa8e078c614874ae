"""``python -m avss_dist``: the command line."""

from avss_dist.cli import main

if __name__ == "__main__":
    main()
