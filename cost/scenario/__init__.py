"""cost/scenario"""
