"""What a run and the commands show in the terminal, and how long the phases of a step take."""
