"""The memory planner: how much memory a run needs, from the config of its model alone."""
