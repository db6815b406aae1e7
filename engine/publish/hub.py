"""Push to the hub: whether it can work is checked before a run, and a failed push names the command to repeat it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from data.batch import RunFailed, UserError
from data.files import MARK
from engine.config.fields import Config, config_fields, flag_of
from engine.publish.card import card_on_hub
from engine.publish.export import PROJECTIONS_FILE, portable

REPO = re.compile(r"([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*", re.ASCII)


def check_push(name: str, log: Callable[[str], None]) -> None:
    """Raise UserError where a push to `name` cannot work: a bad name, offline, no token or one the hub refuses."""
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HfHubHTTPError

    if not REPO.fullmatch(name) or "--" in name or ".." in name:
        raise UserError(f"--push-to-hub {name}: a hub repository is called OWNER/NAME (letters, digits, - _ .)")
    if constants.HF_HUB_OFFLINE:
        raise UserError("--push-to-hub needs the network; unset HF_HUB_OFFLINE, or push later with `run.py export`")
    if not get_token():
        raise UserError("--push-to-hub needs a token with write access; run `hf auth login` or set HF_TOKEN")
    try:
        HfApi().whoami()
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise UserError("--push-to-hub: the hub refuses this token; run `hf auth login` or mend HF_TOKEN") from None
        log(f"the hub answers {error.response.status_code} now; the push is tried at the end all the same")
    except Exception as error:  # of many kinds; the network may be back when there is something to push
        log(f"the hub is not reached now ({type(error).__name__}); the push is tried at the end all the same")


def push(folder: Path, cfg: Config, run: str, settings: Sequence[str], log: Callable[[str], None]) -> None:
    """Upload a model folder in one commit and log its URL; the card on the hub shows how to load it from there.

    The folder stays as it is; no path of this machine is uploaded. Raises RunFailed with the command that pushes `run`
    later, which repeats `settings`.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api, name = HfApi(), cfg.push_to_hub
    try:
        repo = api.create_repo(name, private=cfg.private, exist_ok=True)
        operations = []
        for path in sorted(folder.iterdir()):
            content: Path | bytes = path
            if path.name == PROJECTIONS_FILE:
                content = portable(path)
            elif path.name == "README.md":
                content = card_on_hub(path, repo.repo_id, cfg.license).encode()
            if path.name != MARK:
                operations.append(CommitOperationAdd(path.name, content))
        api.create_commit(repo.repo_id, operations, commit_message="Upload a model tuned with thumbtune")
    except Exception as error:  # of many kinds, from several libraries; all of them are about this push
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise RunFailed(f"the push to {name} failed ({reason}); nothing is lost, push later with\n"
                        + push_command(cfg, run, settings)) from error
    log(f"pushed to {repo}")


def push_command(cfg: Config, run: str, names: Sequence[str]) -> str:
    """Return the command line that pushes `run`, with those of the settings `names` that are not defaults."""
    flags = ["--run", run]
    for name in names:
        value = getattr(cfg, name)
        if value and value != config_fields()[name].default:
            flags.append(flag_of(name))
            if value is not True:
                flags.append(str(value))
    return shlex.join(["python", "run.py", "export", *flags])
