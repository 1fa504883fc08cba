"""The broker: a registry of workers, a waiting room for each model, and the routing between clients and workers."""
