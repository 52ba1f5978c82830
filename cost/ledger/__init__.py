"""cost/ledger"""
