"""The native API, `/v1`: one module for each noun, each with a router."""
