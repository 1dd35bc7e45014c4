"""The way of a bundle to the hub: one commit, so that nobody meets half of it."""

from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi

from bridges import bundle_format
from interventions.bundle.channels import FILE as CHANNELS
from interventions.sharing.packaging import PARTS, DensePart, save_pretrained
from sparse_model.io.hub import hub_errors_named

_REPLACED = (*(f"{part}/*" for part in PARTS), CHANNELS, "metrics.json", bundle_format.FILE)


def push_to_hub(
    run: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    dense: DensePart = "inside",
) -> str:
    """Share a finished run on the hub as `repo_id` (owner/name), a name for `load_dense`; returns the commit's URL.

    What is sent is what `save_pretrained` writes, in one commit that takes the place of an earlier bundle's files;
    others there stay. `private` counts where the repository is new; `revision` is a branch, made where there is none;
    `token` is that of `hf auth login` where None.

    Raises what `save_pretrained` raises, before anything is sent, and OSError where the hub refuses or breaks off.
    """
    api = HfApi(token=token)
    with TemporaryDirectory() as temporary:
        folder = save_pretrained(run, Path(temporary, "bundle"), dense=dense, repo_id=repo_id)
        with hub_errors_named(f"cannot push {run} to {repo_id!r}: the bundle was not sent"):
            api.create_repo(repo_id, private=private, exist_ok=True)
            if revision:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                revision=revision,
                commit_message="A bundle of sparse-bridges",
                delete_patterns=list(_REPLACED),
            )
    return str(commit.commit_url)
