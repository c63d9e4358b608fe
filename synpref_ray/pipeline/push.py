"""An export that has been made goes to a repository of the Hugging Face Hub.

Our choice: by a verb of its own and nothing else, into a private repository unless told, whole or with the words by which the hub refused; what
simulated people labelled only if that is said.
"""

from pydantic import Field

from synpref_ray.credentials import redact
from synpref_ray.errors import ConfigError, InputError
from synpref_ray.pipeline.export import CARD, RECORD
from synpref_ray.pipeline.job import JobConfig
from synpref_ray.reporting.run import Run
from synpref_ray.tables.storage import Storage

FILES = [CARD, RECORD, "data/train-*.parquet"]


class PushConfig(JobConfig):
    """Which export goes where. The token is what `huggingface_hub` finds: HF_TOKEN, or that of `hf auth login`."""

    folder: str
    """An export: the folder that jobs/export.py named."""
    repo: str = Field(pattern=r"^[\w.-]+/[\w.-]+$")
    """OWNER/NAME of a data set repository, made if it is not there."""
    private: bool = True  # ours: publishing is one more decision
    revision: str = "main"
    """The branch to push to."""
    simulated: bool = False  # ours: labels of simulated people are no data; true: they go out all the same, and the card says so


def check_push(config: PushConfig) -> None:
    """Check that there is such an export, whole, on this machine.

    Raises:
        InputError: it is not there.
        ConfigError: simulated people labelled it, and nobody said that it may go out.
    """
    target = Storage(config.folder)
    if not target.is_local:
        raise InputError(f"{target.url} is not on this machine: copy the folder, or export with out=FOLDER; the hub's client sends local files")
    if not target.exists(RECORD):
        raise InputError(f"{target.url} is no finished export (it has no {RECORD}): python jobs/export.py set=NAME out={config.folder}")
    record = target.read_json(RECORD)
    there = [path for path in target.list_files("data") if path.endswith(".parquet")]
    if len(there) != record["files"]:
        raise InputError(f"{target.url} has {len(there)} of its {record['files']} files: export it again")
    if record["simulated_gold"] and not config.simulated:
        raise ConfigError(f"{target.url} was labelled by simulated people: it is a trial, not data; simulated=true pushes it all the same")


def run_push(config: PushConfig, run: Run) -> str:
    """Upload the export in one commit; return where it is.

    Raises:
        InputError: the hub refused, or cannot be reached.
    """
    from httpx2 import HTTPError
    from huggingface_hub import HfApi

    check_push(config)
    target = Storage(config.folder)
    record = target.read_json(RECORD)
    api = HfApi()
    try:
        api.create_repo(config.repo, repo_type="dataset", private=config.private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=config.repo,
            folder_path=target.local_path("").rstrip("/"),
            repo_type="dataset",
            revision=config.revision,
            allow_patterns=FILES,
            delete_patterns=FILES,  # files of an earlier, larger export
            commit_message=f"{record['set']}: {record['pairs']} pairs",
        )
    except (HTTPError, OSError, ValueError) as error:  # as the client raises them: refused, not reachable, no token, offline
        raise InputError(f"cannot push to {config.repo}: {type(error).__name__}: {redact(' '.join(str(error).split()))[:300]}") from None
    run.metrics["push"] = {"repo": config.repo, "revision": config.revision, "commit": commit.oid, "pairs": record["pairs"]}
    return f"{record['pairs']} pairs in {record['files']} files: {commit.commit_url}"
