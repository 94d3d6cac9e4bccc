"""What does a machine do for a hub? Its agent: small, without torch; training and jobs are its children.

agent.py       one process, one loop, exit codes        membership.py  join, credential, one agent a folder
state.py       events in, instructions out              hardware.py    what this machine is
words.py       those events and instructions            runners.py     the child process
tasks.py       a lease on its way                       spool.py       finished work, until the hub has it
orders.py      what the child is told                   line.py        patience with the hub
errands.py     what takes time: fetch, send, watch      screen.py      what the person sees

jobs/keeper.py    asks for orders, one thread a job     jobs/hubside.py   what a job fetches and tells
jobs/attempt.py   from the lease to the command's end   jobs/reports.py   ends, until the hub has them
jobs/local.py     the same without a hub                jobs/output.py    its output, masked, to the hub
"""
