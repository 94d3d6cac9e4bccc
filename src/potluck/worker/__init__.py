"""What does a machine do for a pool? Its agent: small, without torch; the training is its child.

agent.py       one process, one loop, exit codes        membership.py  join, credential, one agent a folder
state.py       events in, instructions out              hardware.py    what this machine is
words.py       those events and instructions            runners.py     the child process
tasks.py       a lease on its way                       spool.py       finished work, until the hub has it
orders.py      what the child is told                   line.py        patience with the hub
errands.py     what takes time: fetch, send, watch      screen.py      what the person sees
"""
