"""The stages, each a module with `run(job, cluster, tracker) -> metrics`, readable from top to bottom.

They get what they need as arguments: `cluster` (alignkit.runtime.sharding.Cluster) is the only thing that knows of
ranks, `tracker` (alignkit.observe.tracking.Tracker) the only thing that knows where metrics go.
"""
