"""The artefact store: templates as chunks that are named by their content.

Agents fill it and take from it; the control plane keeps it tidy. An artefact is a manifest that
names chunks; it is written last, so an artefact is whole or not there. Whatever comes out of a
store is verified by its name.
"""
