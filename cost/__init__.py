"""What tokens cost: the ledger of requests, their energy, prices, and the report."""
