"""``python -m avss_dist.cli``."""

from avss_dist.cli import main

main()
