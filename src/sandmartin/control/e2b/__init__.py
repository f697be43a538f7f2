"""E2B's REST interface, over the same services as our own: their clients need not know of us.

What is theirs stays here: names and units on the wire, two states where we have many, a time after
which a sandbox ends, errors with a number. See `docs/e2b.md`.
"""
