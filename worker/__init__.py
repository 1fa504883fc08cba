"""The worker: registers with brokers, runs an engine, streams its tokens."""
