"""The ledger of requests in SQLite: schema, rows, sums, and the thread that writes it."""
