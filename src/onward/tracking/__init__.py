"""Tracking: the store, one run, a sweep's parent run, and what the UI shows of them."""
