"""The commands of `grpo-ext`, one a file: `add_arguments(parser)` and `run(options)`."""
