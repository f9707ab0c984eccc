"""Faults and attacks, each run end to end against real servers and files: `python -m tests.faults`.

A row makes one thing go wrong and says which body must come back. After each row the harness looks for what was left
behind and runs a healthy job.
"""
