"""Rolls, receipts and contact sets: who is in a campaign, what became true of them, and who can be reached.

``chunks`` is the arithmetic (numpy, pure); ``sql`` reads and writes it.
"""
