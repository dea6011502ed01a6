"""Load the splits of a data set from the Hub, a local file, a folder of files, or a folder made by `save_to_disk`.

load_splits("problems.jsonl.gz")   ->  Splits(name="problems.jsonl.gz", rows={"train": Dataset}, note="")
load_splits("openai/gsm8k")        ->  Splits(..., note="config 'main', the first of 2 (--dataset_config ...)")
"""

from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, DatasetDict, get_dataset_config_names, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from grpo_ext.model.load import unreachable_message

FILE_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
ZIPPED = ".gz"  # further suffix of a compressed text file
SAVED_SPLIT, SAVED_SPLITS = "state.json", "dataset_dict.json"  # written by `save_to_disk`


@dataclass(frozen=True, kw_only=True)
class Splits:
    """The splits of a data set.

    Attributes:
        name: the data set as the user named it.
        rows: name of the split -> its rows.
        note: the choice that was made by default, in plain words; empty if there was nothing to choose.
    """

    name: str
    rows: dict[str, Dataset]
    note: str = ""

    def pick(self, split: str, flag: str) -> Dataset:
        """The rows of a split.

        Args:
            flag: the flag that selects the split, for the error message.

        Raises:
            ValueError: there is no such split, or it has no rows.
        """
        if split not in self.rows:
            first = next(iter(self.rows))
            raise ValueError(
                f"'{self.name}' has no split {split!r}; it has: {', '.join(self.rows)}. Add {flag} {first}."
            )
        if len(self.rows[split]) == 0:
            raise ValueError(f"Split {split!r} of '{self.name}' has no rows.")
        return self.rows[split]

    def only_or(self, split: str) -> str:
        """The name of the only split if there is one, else `split`."""
        return next(iter(self.rows)) if len(self.rows) == 1 else split


def load_splits(name: str, config: str | None = None) -> Splits:
    """Every split of a data set.

    Args:
        name: a data set of the Hub, a file (`FILE_FORMATS`; text files may be compressed as .gz), a folder of such
            files, or a folder that `save_to_disk` wrote.
        config: config of a Hub data set; by default the first one.

    Raises:
        SystemExit: the data is neither on disk nor reachable on the Hub.
        ValueError: the format of a file is not supported, or the file cannot be read.
    """
    path = Path(name)
    try:
        if path.is_file():
            return Splits(name=name, rows=dict(_load_file(path)))
        if path.is_dir():
            return Splits(name=name, rows=dict(_load_folder(path, config)))
        note = ""
        if config is None:
            configs = get_dataset_config_names(name)
            config = configs[0]
            if len(configs) > 1:
                note = f"config {config!r}, the first of {len(configs)} (--dataset_config selects another)"
        splits = load_dataset(name, config)
    except DatasetGenerationError as error:
        raise ValueError(f"'{name}' cannot be read: {error.__cause__ or error}") from None
    except (ConnectionError, DatasetNotFoundError, OSError) as error:
        raise SystemExit(unreachable_message("Data set", name, error)) from None
    for rows in splits.values():
        rows.info.dataset_name = name  # `datasets` drops the owner's name
    return Splits(name=name, rows=dict(splits), note=note)


def _load_file(path: Path) -> DatasetDict:
    suffix = _format_of(path)
    if suffix is None:
        raise ValueError(
            f"'{path}' has suffix {path.suffix!r}; valid: {', '.join(FILE_FORMATS)}, and {ZIPPED} after any of the "
            f"text formats (.jsonl{ZIPPED})."
        )
    options = {"sep": "\t"} if suffix == ".tsv" else {}
    return load_dataset(FILE_FORMATS[suffix], data_files=str(path), **options)


def _load_folder(path: Path, config: str | None) -> DatasetDict:
    if (path / SAVED_SPLITS).exists():
        return load_from_disk(str(path))
    if (path / SAVED_SPLIT).exists():
        return DatasetDict({"train": load_from_disk(str(path))})
    saved = sorted(folder for folder in path.iterdir() if (folder / SAVED_SPLIT).exists())
    if saved:
        return DatasetDict({folder.name: load_from_disk(str(folder)) for folder in saved})
    files = sorted(file for file in path.iterdir() if _format_of(file) is not None)
    if any(file.suffixes != [suffix.lower() for suffix in file.suffixes] for file in files):  # unknown to `datasets`
        return DatasetDict({file.name.partition(".")[0]: _load_file(file)["train"] for file in files})
    return load_dataset(str(path), config)


def _format_of(path: Path) -> str | None:
    """The suffix that gives the format of a file, ignoring compression; None if the format is not supported."""
    suffixes = [suffix.lower() for suffix in path.suffixes] or [""]
    is_zipped = suffixes[-1] == ZIPPED and len(suffixes) > 1
    suffix = suffixes[-2] if is_zipped else suffixes[-1]
    return None if suffix not in FILE_FORMATS or (is_zipped and suffix == ".parquet") else suffix
