"""`python -m potluck.cli`, for machines where the `potluck` script is not on the path."""

from potluck.cli import main

main()
