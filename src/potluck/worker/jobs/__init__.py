"""How does a worker run the jobs that its hub gives it?

`box` says what a command is told, `executors` start and end it, `shim` and `limits` hold it; the rest is its life.
"""
