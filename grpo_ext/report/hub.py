"""Upload a run to the Hub: the selection of files, the permission check, and error messages.

One commit has the adapter `default` (or the model of a full fine-tune), the tokenizer, the card, `curves.png` and
`summary.json`. Everything else stays local: resumable checkpoints, pickled arguments, the adapter `ref`, metrics and
completions. If the base model is a folder, its path is removed from the files that PEFT and the summary write.
"""

import json
import shlex
import shutil
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi
from huggingface_hub.errors import OfflineModeIsEnabled
from transformers import TrainingArguments

from grpo_ext.console.terminal import show
from grpo_ext.report.card import load_from_repository, read_card
from grpo_ext.report.run_files import CARD_FILE, CURVES_FILE, SUMMARY_FILE

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
MODEL_FILES = ("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json")
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
)
REPORT_FILES = (CURVES_FILE, SUMMARY_FILE)  # in addition to the card
# File -> the key in it that names the base model.
BASE_MODEL_KEYS = {"adapter_config.json": "base_model_name_or_path", SUMMARY_FILE: "base_model"}


def check_write_access(args: TrainingArguments) -> str:
    """The full name of the repository that a run with these arguments pushes to; created if it does not exist.

    Raises:
        ValueError: the repository cannot be pushed to; the message says what to type.
    """
    name = args.hub_model_id or Path(args.output_dir).absolute().name
    try:
        return ensure_writable_repository(
            name, token=args.hub_token, private=args.hub_private_repo, revision=args.hub_revision
        )
    except ValueError as error:
        later = push_command(args.output_dir, name, private=args.hub_private_repo, revision=args.hub_revision)
        raise ValueError(f"{error} Alternatively, train with push_to_hub=False and push afterwards: {later}") from error


def ensure_writable_repository(
    name: str, *, token: str | None = None, private: bool | None = None, revision: str | None = None
) -> str:
    """The full name of this repository; the repository and its branch `revision` are created if they do not exist.

    Creation alone is not a sufficient check: for an existing repository, it succeeds even with a read-only token.

    Raises:
        ValueError: the repository cannot be pushed to.
    """
    api = HfApi(library_name="grpo-ext", token=token)
    try:
        repository = api.create_repo(name, private=private, exist_ok=True).repo_id
        api.auth_check(repository, write=True)
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
    except Exception as error:
        raise ValueError(f"'{name}' on the Hub cannot be pushed to: {explain_failure(error)}.") from error
    return repository


def explain_failure(error: Exception) -> str:
    """Why a request to the Hub failed, and what the user can do."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set. Unset it"
    if status == 401:
        return (
            "there is no token, or it was rejected. Log in with `hf auth login`, or set HF_TOKEN, using a token with "
            "write access from https://huggingface.co/settings/tokens"
        )
    if status == 403:
        return (
            "the token may not write there. Use a token with write access from https://huggingface.co/settings/tokens, "
            "or name a repository of your own"
        )
    return _error_summary(error) + ("" if isinstance(error, ValueError) else ". Try again later")


def _error_summary(error: Exception) -> str:
    """`HfHubHTTPError: Server error '500 Internal Server Error' for url ...`"""
    line = next((line for line in str(error).splitlines() if line.strip()), "no message")
    return f"{type(error).__name__}: {line.partition(' (Request ID')[0].rstrip('. ')}"


def push_command(
    folder: str | Path, repository: str, *, private: bool | None = None, revision: str | None = None
) -> str:
    """`grpo-ext push outputs/math someone/math --private`"""
    options = ["--private"] * bool(private) + (["--revision", revision] if revision is not None else [])
    return shlex.join(["grpo-ext", "push", str(folder), repository, *options])


def stage_files(folder: str | Path, *, with_report: bool = True) -> TemporaryDirectory[str]:
    """A copy of the files in this folder that are published, without local paths.

    Raises:
        ValueError: the folder contains neither an adapter nor a model.
    """
    folder = Path(folder)
    weights = next((files for files in (ADAPTER_FILES, MODEL_FILES) if (folder / files[0]).exists()), None)
    if weights is None:
        saved = max(folder.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime, default=None)
        hint = f" The last checkpoint can be pushed: {push_command(saved, 'REPO')}" if saved else ""
        raise ValueError(
            f"'{folder}' has neither {ADAPTER_FILES[0]} nor {MODEL_FILES[0]}, so there is nothing to push.{hint}"
        )
    staged = TemporaryDirectory(prefix="grpo-ext-push-")
    card = read_card(folder)
    for pattern in (*weights, *TOKENIZER_FILES, *(REPORT_FILES if with_report else ())):
        for path in folder.glob(pattern):
            shutil.copy(path, staged.name)
    base = card.data.get("base_model") if card else None
    for name, key in BASE_MODEL_KEYS.items():
        path = Path(staged.name, name)
        if path.exists():
            path.write_text(
                json.dumps(json.loads(path.read_text(encoding="utf-8")) | {key: base}, indent=2) + "\n",
                encoding="utf-8",
            )
    if card and with_report:
        card.save(Path(staged.name, CARD_FILE))
    return staged


def commit_files(staged: str, api: HfApi, repository: str, *, path_in_repo: str = "", **options: Any) -> CommitInfo:
    """Push the staged files in one commit; `options` are those of `HfApi.create_commit`."""
    card = Path(staged, CARD_FILE)
    if card.exists():
        card.write_text(load_from_repository(card.read_text(encoding="utf-8"), repository), encoding="utf-8")
    additions = [
        CommitOperationAdd((PurePosixPath(path_in_repo) / file.name).as_posix(), file)
        for file in Path(staged).iterdir()
    ]
    return api.create_commit(repository, additions, **options)


class PublishingClient:
    """Replaces the Hub client in transformers' trainer: it pushes a selection of files, and never ends a run.

    transformers decides when to push, and with which commit message. It requests uploads of whole folders; this client
    uploads only the files that `stage_files` selects. A failed push prints the command that repeats it.
    """

    def __init__(self, args: TrainingArguments):
        self._args = args
        self._api = HfApi(library_name="grpo-ext")
        self.create_repo = self._api.create_repo

    def upload_folder(
        self,
        *,
        repo_id: str,
        folder_path: str,
        commit_message: str,
        token: str | None,
        revision: str | None,
        run_as_future: bool,
        path_in_repo: str = "",
        ignore_patterns: object = None,
    ) -> CommitInfo | Future[CommitInfo | None] | None:
        """Replaces `HfApi.upload_folder`; None if the upload failed. The files are copied before this returns."""

        def push(staged: TemporaryDirectory[str]) -> CommitInfo | None:
            options = {"commit_message": commit_message, "token": token, "revision": revision}
            with self._reporting_failure(repo_id, revision), staged as files:
                return commit_files(files, self._api, repo_id, path_in_repo=path_in_repo, **options)
            return None

        with self._reporting_failure(repo_id, revision):
            staged = stage_files(folder_path, with_report=not path_in_repo)
            return self._api.run_as_future(push, staged) if run_as_future else push(staged)
        nothing: Future[CommitInfo | None] = Future()
        nothing.set_result(None)
        return nothing if run_as_future else None

    @contextmanager
    def _reporting_failure(self, repository: str, revision: str | None) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            folder = self._args.output_dir
            command = push_command(folder, repository, private=self._args.hub_private_repo, revision=revision)
            show(f"Not pushed: {explain_failure(error)}. All files are still in {folder}. Push again: {command}")
