"""The terminal output of runs and commands, and the duration of the phases of a step."""
