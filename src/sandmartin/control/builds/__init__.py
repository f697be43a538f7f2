"""Template builds: the languages in which they are written, and the one form they come to.

`dockerfile`, `recipe` and `e2b_steps` read a language into a `plan.Build`; `actions` says what a
stage of it comes to on what it starts from, step by step, with the key of each. No VM is known
here, and nothing that a user wrote is run.
"""
