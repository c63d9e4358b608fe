"""Which processes of a node give way: tasks before the actors of steps and training workers, most of which hold models."""

MODEL_ENVIRONMENT = {"RAY_worker_niceness": "0"}
"""Environment (`runtime_env`) of steps' actors and of training workers: at the priority of the node's own processes.

Our choice: Ray lowers workers by 15, below all else of a node, so that busy tasks never starve its services; its job manager starts drivers at 0, as
here. With as many busy threads as cores, every wake-up of anything else then halts an engine. Tasks keep Ray's 15."""
