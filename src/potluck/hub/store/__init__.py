"""How does the hub remember? The only place that speaks SQL (with postgres.py, which only starts the server).

`Ledger` owns the pool of connections, the migrations and the notifications. The other modules of this package are its
vocabulary, split by reason to change: `people` (invites, credentials, workers), `leases`, `runs`. Every statement has a
name and a file under hub/sql/queries.
"""

from potluck.hub.store.ledger import CHANNEL, Ledger, Transaction
from potluck.hub.store.shared import Rows

__all__ = ["CHANNEL", "Ledger", "Rows", "Transaction"]
