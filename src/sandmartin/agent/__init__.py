"""The host agent: the microVMs of one machine, their disks, networks and life cycle."""
