"""What tokens cost: energy, prices, the ledger of requests, and reports."""
