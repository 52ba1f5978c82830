"""cost/report"""
