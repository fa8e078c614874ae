"""``python -m avss_dist``."""

from avss_dist.cli import main

main()
