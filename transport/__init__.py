"""ZeroMQ, and nothing but: the only shared code that touches zmq."""
