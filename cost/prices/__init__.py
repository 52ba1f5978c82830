"""cost/prices"""
