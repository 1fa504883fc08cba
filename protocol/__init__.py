"""TMQ/1, the wire protocol: messages, their encoding, their limits, and the pure machines that go with them.

Nothing here knows of sockets, clocks or threads. SPEC.md beside this file is the protocol in prose.
"""
