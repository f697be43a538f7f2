"""Build contexts: the files that a template's build is given, for the client and for the server.

`directory` packs one, `archive` reads one that anybody may have sent, `tree` is what a COPY takes
of it. Here is also how an error names a place in what a user wrote: `source`.
"""
