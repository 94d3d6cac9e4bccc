"""`python -m potluck.train`: the training child of a worker's agent."""

from potluck.train.child import main

main()
