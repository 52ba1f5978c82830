"""The report of the ledger: its sums, as text, as a page and as rows for a spreadsheet."""
