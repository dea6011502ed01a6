"""`python -m grpo_ext COMMAND` is `grpo-ext COMMAND`."""

from grpo_ext.cli import main

if __name__ == "__main__":
    main()
