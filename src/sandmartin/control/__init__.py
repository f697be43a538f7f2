"""The control plane: teams, hosts, sandboxes, and the API over them.

It keeps no state of its own: all of it is in the database, and any replica can go on with it.
"""
