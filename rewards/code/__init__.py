"""The program reward: run model-written Python programs on tests in a sandbox."""
