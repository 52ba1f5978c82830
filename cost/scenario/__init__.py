"""The cost of a box on paper, without a ledger, in the same forms as the report."""
