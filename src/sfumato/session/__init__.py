"""Joint runs: paths, keyed streams, exchanges, the ledger, and the drivers that run coroutines."""
