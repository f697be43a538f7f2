"""The control plane: teams, hosts, sandboxes, and the API over them. It keeps no state of its own."""
