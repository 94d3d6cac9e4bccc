"""What can the hub do? One function per use case; each is one transaction, and tells the news after it.

`people` (links, joining, credentials), `work` (leases, reports, heartbeats), `runs` (start, steer, look), `rounds` (what
upkeep settles: merges, tastes, ends), `files` (blobs in and out). They take a `Desk`, which is what one hub process has.
"""
