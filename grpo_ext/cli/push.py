"""`grpo-ext push outputs/math someone/math`: publish a run on the Hub, or repeat a push that failed."""

import argparse

from grpo_ext.console.quiet import quiet_libraries
from grpo_ext.console.terminal import show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("folder", metavar="DIR", help="the output folder of a run, or one of its checkpoints")
    parser.add_argument("repository", metavar="REPO", help="a repository on the Hub: owner/name, or name for your own")
    parser.add_argument("--private", action="store_true", help="make the repository private if it does not exist yet")
    parser.add_argument("--revision", help="the branch to push to; default: main")


def run(options: argparse.Namespace) -> None:
    """Create the repository if it does not exist, push to it in one commit, and print the URL of the commit."""
    quiet_libraries()
    from huggingface_hub import HfApi

    from grpo_ext.report.hub import commit_files, ensure_writable_repository, explain_failure, push_command, stage_files

    private = options.private or None
    with stage_files(options.folder) as files:
        repository = ensure_writable_repository(options.repository, private=private, revision=options.revision)
        try:
            done = commit_files(
                files,
                HfApi(library_name="grpo-ext"),
                repository,
                commit_message="Push of a run",
                revision=options.revision,
            )
        except Exception as error:
            again = push_command(options.folder, repository, private=private, revision=options.revision)
            raise ValueError(
                f"Not pushed: {explain_failure(error)}. All files are still in {options.folder}. Push again: {again}"
            ) from error
    show(f"pushed to {done.commit_url}")
