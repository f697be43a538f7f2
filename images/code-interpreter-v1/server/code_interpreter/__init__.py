"""The code interpreter: runs code in kernels that keep their state, and streams what it gives.

It runs inside a sandbox, as its user, and serves E2B's protocol on port 49999. What listens to it
may be anybody who reaches that port; what it does is no more than that user may do anyway.
"""
