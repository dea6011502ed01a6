"""`grpo-ext push outputs/math someone/math`: publish what a run left behind, or try again where a push failed."""

import argparse

from huggingface_hub import HfApi

from grpo_ext.report.hub import commit, retry_command, stage, why_not, writable_repository


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    parser.add_argument("folder", metavar="DIR", help="the output folder of a run, or one of its checkpoints")
    parser.add_argument("repository", metavar="REPO", help="on the Hub: owner/name, or a name of your own")
    parser.add_argument("--private", action="store_true", help="where the repository has to be created first")
    parser.add_argument("--revision", help="the branch to push to; default: main")


def run(options: argparse.Namespace) -> None:
    """Create the repository where there is none, push to it in one commit, and print its address."""
    private = options.private or None
    with stage(options.folder) as files:
        repository = writable_repository(options.repository, private=private, revision=options.revision)
        try:
            done = commit(
                files,
                HfApi(library_name="grpo-ext"),
                repository,
                commit_message="Push of a run",
                revision=options.revision,
            )
        except Exception as error:
            again = retry_command(options.folder, repository, private=private, revision=options.revision)
            raise ValueError(
                f"Not pushed: {why_not(error)}. All of it is in {options.folder}; push it again: {again}"
            ) from error
    print(f"pushed to {done.commit_url}")
