"""What users get wrong: each mistake ends with code 2 and at most three lines that name the fix, no traceback."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import pytest
from helpers import inside, run, tiny_clip

DATA = ["--model", "{model}", "--dataset", "{pairs}"]
SEARCH = ["search", *DATA]
SWEEP = ["sweep", *DATA]
EXPORT = ["export", "--run", "{alone}", "--to", "{tmp}/new"]
PUSH = ["export", "--run", "{alone}", "--push-to-hub"]

MISTAKES = {  # arguments -> what the answer has to name
    # the command line
    "unknown command": (["trian"], "did you mean train"),
    "command of a newcomer": (["finetune"], "there is train, demo"),
    "vectors without a folder": (["embed", "--dataset", "{pairs}", "--model", "{model}"], "--out DIR"),
    "flag not like --help": (["check", "--model", "x"], "unknown argument --model\n"),
    "typo in a flag": (["--epoch", "3"], "did you mean --epochs"),
    "flag of another command": (["shards", "--epochs", "3"], "unknown argument --epochs"),
    "a flag twice": (["--lr", "1", "--epochs", "3", "--lr=2"], "--lr is given twice"),
    "a list twice": (["--trainable", "a", "--trainable", "b"], "as A,B"),
    "both ends of a switch": (["--quiet", "--no-quiet"], "--quiet and --no-quiet"),
    "word too many": (["train", "fast"], "unknown argument fast"),
    "word for a number": (["--epochs", "many"], "--epochs"),
    "flag without its value": (["--epochs"], "--epochs"),
    "zero epochs": (["--epochs", "0"], "at least 1"),
    "negative epochs": (["--epochs", "-3"], "at least 1"),
    "nan": (["--lr", "nan"], "at least 0"),
    "infinity": (["--lr", "inf"], "at least 0"),
    "endless warm-up": (["--warmup", "2"], "between 0 and 1"),
    "seed beyond 32 bits": (["--seed", "9999999999999999999999"], "at most"),
    "bad choice": (["--schedule", "cubic"], "linear"),
    "nothing to train": (["--trainable", ","], "--trainable projection"),
    # the recipe file
    "two dashes for a value": (["--patience=--"], "--patience needs a value"),
    "no such config": (["--config", "nowhere.toml"], "nowhere.toml"),
    "config is a folder": (["--config", "{tmp}"], "{tmp}"),
    "config is not TOML": (["--config", "{pairs}/train.csv"], "line 1"),
    "wrong type in TOML": (["--config", "{mess}/type.toml"], "epochs must be int, not str"),
    "numbers for names in TOML": (["--config", "{mess}/list.toml"], "trainable must be"),
    "typo in TOML": (["--config", "{mess}/typo.toml"], "did you mean epochs"),
    "negative in TOML": (["--config", "{mess}/low.toml"], "at least 1"),
    "config would be replaced": (["--write-config", "{mess}/low.toml"], "choose another name"),
    # the model
    "no such model": (["--model", "./nowhere", "--dataset", "{pairs}"], "nowhere"),
    "model is a file": (["--model", "{pairs}/train.csv", "--dataset", "{pairs}"], "config.json"),
    "model folder without a model": (["--model", "{pairs}", "--dataset", "{pairs}"], "no config.json"),
    "model that is not CLIP": (["--model", "{mess}/bert", "--dataset", "{pairs}"], "thumbtune tunes CLIPModel"),
    "damaged weights": (["--model", "{mess}/damaged", "--dataset", "{pairs}"], "its weights are damaged"),
    "config and weights of two models": (["--model", "{mess}/mixed", "--dataset", "{pairs}"], "asks for 8x"),
    "offline": (["--model", "owner/name", "--dataset", "{pairs}"], "owner/name"),
    "nothing trains": ([*DATA, "--trainable", "projektion"], "projektion"),
    "cached cannot": ([*DATA, "--trainable", "all", "--mode", "cached"], "--mode streaming"),
    "cuda without": (["--device", "cuda"], "--device cpu"),
    # the data
    "no such dataset": (["--model", "{model}", "--dataset", "nowhere"], "nowhere"),
    "dataset offline": (["--model", "{model}", "--dataset", "owner/pairs"], "owner/pairs"),
    "dataset by URL": (["check", "--dataset", "https://example.com/pairs.zip"], "download"),
    "dataset of no known kind": (["check", "--dataset", "{mess}/pairs.docx"], "pairs.docx"),
    "empty folder": (["check", "--dataset", "{mess}/empty"], "{mess}/empty"),
    "table without rows": (["--model", "{model}", "--dataset", "{mess}/headers.csv"], "no"),
    "empty table": (["check", "--dataset", "{mess}/empty.csv"], "empty.csv"),
    "dataset without images": (["check", "--dataset", "{mess}/no-images.csv"], "--image-column"),
    "no such column": ([*DATA, "--title-column", "titel"], "did you mean 'title'"),
    "dead images": (["--model", "{model}", "--dataset", "{mess}/dead.csv"], "missing-file"),
    "no such image folder": (["check", "--dataset", "{mess}/dead.csv", "--image-root", "{tmp}/none"], "no such folder"),
    "separator of two letters": (["check", "--dataset", "{pairs}", "--delimiter", ",,"], "one character"),
    "no such encoding": (["check", "--dataset", "{pairs}", "--encoding", "utf9"], "--encoding utf9"),
    "template without a place": (["check", "--dataset", "{pairs}", "--template", "a photo"], "must hold {{}}"),
    "no such split to use": ([*DATA, "--splits", "train=tarin"], "there is train, valid, test"),
    "no such split": (["eval", *DATA, "--split", "tset"], "train, valid, test"),
    "no training split": (["--model", "{model}", "--dataset", "{mess}/only"], "no split 'train'"),
    "batch larger than data": ([*DATA, "--batch-size", "38"], "at most --batch-size 37"),
    # where things go
    "nothing to resume": (["--resume", "--out", "{tmp}/none"], "holds no run"),
    "resumed with another recipe": (["--resume", "--out", "{used}", "--lr", "5"], "--lr 0.25"),
    "nobody's home": (["--out", "~nobody-of-that-name/run"], "nobody's home"),
    "out is a file": ([*DATA, "--out", "{pairs}/train.csv"], "--out"),
    "out holds a run": ([*DATA, "--out", "{used}"], "--resume"),
    "out is the base model": ([*DATA, "--out", "{model}"], "{model} holds config.json"),
    "out is the dataset": ([*DATA, "--out", "{pairs}"], "the folder of --dataset"),
    "out holds a foreign model": (["--model", "nowhere", "--out", "{mess}/theirs"], "holds model"),
    "out holds foreign checkpoints": (["--dataset", "nowhere", "--out", "{mess}/other"], "holds checkpoints"),
    "sweep over a foreign page": ([*SWEEP, "--space", "lr=1", "--out", "{mess}/paper"], "holds report.html"),
    "eval over foreign figures": (["eval", *DATA, "--out", "{mess}/figures"], "holds metrics.json"),
    "eval over a run": (["eval", *DATA, "--out", "{used}"], "holds a run"),
    "shards among others'": (["shards", "--dataset", "{pairs}", "--out", "{mess}/tars"], "holds theirs.tar"),
    "shards into the dataset": (["shards", "--dataset", "{pairs}", "--out", "{pairs}"], "the folder of --dataset"),
    "export over the base": (["export", "--run", "{alone}", "--to", "{model}"], "choose a new folder"),
    "foreign page": ([*SEARCH, "words", "--html", "{mess}/paper/report.html"], "no page of thumbtune's"),
    "foreign checkpoint in a run": ([*DATA[:2], "--resume", "--out", "{mixed_run}"], "step-theirs was not made"),
    "NUL in a path": (["--out", "a\0b"], "NUL"),
    "out that is no text": (["--out", "\udcff"], "UTF-8"),
    "shards without a place": (["shards", "--dataset", "{pairs}"], "--out DIR"),
    "cache is a file": ([*DATA, "--cache-dir", "{pairs}/train.csv"], "--cache-dir"),
    # choosing and checking
    "no such recipe": (["--recipe", "bst"], "reference"),
    "losses that do not go together": (["--loss", "sigmoid", "--hardness", "1"], "--loss symmetric"),
    "rate of towers that do not train": ([*DATA, "--lr-tower", "1e-5"], "none of them trains"),
    "rate of towers without a schedule": (["--lr", "0", "--lr-text", "1e-5"], "an --lr above 0"),
    "no range of steps": (["--profile", "100"], "such as 100:110"),
    "steps that a run does not have": ([*DATA, "--profile", "100:110"], "the run has 6 steps"),
    "more than all of the tuned weights": (["--interpolate", "2"], "within 0 and 1"),
    "metric that is not measured": ([*DATA, "--best-metric", "recall"], "image_to_text_R@1"),
    "nothing to sweep": (SWEEP, '--space "lr='),
    "space without values": ([*SWEEP, "--space", "lr"], "write lr=1e-4,1e-3"),
    "words for numbers in a space": ([*SWEEP, "--space", "lr=a..b"], "lr=a..b"),
    "typo in a space": ([*SWEEP, "--space", "lrr=1e-4"], "did you mean lr"),
    "range without a number of trials": ([*SWEEP, "--space", "lr=1e-4..1e-2:log"], "--trials N"),
    "one fold": ([*SWEEP, "--space", "lr=1e-4", "--folds", "1"], "at least 2"),
    "verify no run": (["verify", "--run", "{tmp}/none"], "holds no run"),
    # searching
    "search for nothing": (SEARCH, "search for what?"),
    "search for both": ([*SEARCH, "words", "--image", "{picture}"], "not both"),
    "no such picture": ([*SEARCH, "--image", "{tmp}/none.png"], "missing-file"),
    "picture is text": ([*SEARCH, "--image", "{pairs}/train.csv"], "not-image"),
    "picture is a folder": ([*SEARCH, "--image", "{pairs}"], "cannot be used"),
    "picture in a private place": ([*SEARCH, "--image", "http://127.0.0.1:9/a.png"], "--allow-host"),
    "no such queries": ([*SEARCH, "--queries", "{tmp}/none.txt"], "one title a line"),
    "queries without a title": ([*SEARCH, "--queries", "{mess}/empty.csv"], "search for what?"),
    "queries are a picture": ([*SEARCH, "--queries", "{picture}"], "not UTF-8"),
    "search in no such split": ([*SEARCH, "words", "--split", "tset"], "train, valid, test"),
    "no answers wanted": ([*SEARCH, "words", "--top", "0"], "at least 1"),
    "page is a folder": ([*SEARCH, "words", "--html", "{pairs}"], "--html"),
    "nothing to search in": (["search", "words", "--model", "{model}", "--dataset", "{mess}/dead.csv"], "run.py check"),
    # handing on
    "export of nothing": (["export", "--to", "{tmp}/new"], "--run DIR"),
    "export to nowhere": (["export", "--run", "{alone}"], "--to DIR"),
    "export of no run": (["export", "--run", "{pairs}", "--to", "{tmp}/new"], "give a run folder"),
    "export of some file": (["export", "--run", "{model}/model.safetensors", "--to", "{tmp}/new"], "projections"),
    "export over something": (["export", "--run", "{alone}", "--to", "{pairs}"], "choose a new folder"),
    "base that is gone": (EXPORT, "/gone"),
    "another base": ([*EXPORT, "--model", "{model}"], "is not the base"),
    "no such checkpoint": (["export", "--run", "{used}", "--checkpoint", "step-9", "--to", "{tmp}/new"], "step-000000"),
    "damaged checkpoint": (["export", "--run", "{used}", "--checkpoint", "step-4", "--to", "{tmp}/new"], "another one"),
    "name that the hub has not": ([*PUSH, "me/my/model"], "OWNER/NAME"),
    "push while offline": ([*PUSH, "me/model"], "unset HF_HUB_OFFLINE"),
}


@pytest.fixture(scope="module")
def mess(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """Files and folders that are not what they should be."""
    from transformers import BertConfig

    mess = tmp_path_factory.mktemp("mess")
    for name, text in {
            "type.toml": 'epochs = "three"', "list.toml": "trainable = [1, 2]", "typo.toml": "epoch = 3",
            "theirs/model/notes.txt": "years of work", "other/checkpoints/step-7/mine.pt": "theirs",
            "paper/report.html": "<h1>mine</h1>", "figures/metrics.json": "{}", "tars/theirs.tar": "",
            "low.toml": "epochs = -1", "pairs.docx": "PK", "headers.csv": "image,title\n", "empty.csv": "",
            "no-images.csv": "title,views\na,1\n", "dead.csv": "image,title\na.png,a\nb.png,b\nc.png,c\nd.png,d\n",
            "only/test.csv": "image,title\na.png,a\n"}.items():
        (mess / name).parent.mkdir(parents=True, exist_ok=True)
        (mess / name).write_text(text)
    (mess / "empty").mkdir()
    BertConfig().save_pretrained(mess / "bert")
    damaged = shutil.copytree(tiny_model, mess / "damaged") / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:1000])
    config = shutil.copytree(tiny_model, mess / "mixed") / "config.json"
    config.write_text(config.read_text().replace('"projection_dim": 16', '"projection_dim": 8'))
    return mess


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """projections.safetensors of a base that is not there any more."""
    from engine.clip.loading import load_clip
    from engine.publish.export import Origin, Tuned, export

    folder = tmp_path_factory.mktemp("alone")
    clip = load_clip(str(tiny_clip(folder / "gone", seed=5)))
    tensors = {"text_projection.weight": clip.model.text_projection.weight}
    export(clip, folder / "out", Tuned(tensors, Origin(str(folder / "gone"), "", "0" * 64, "pairs")), "")
    (folder / "gone").rename(folder / "moved")
    return folder / "out" / "projections.safetensors"


def answered(arguments: list[str]) -> tuple[int, list[str]]:
    """Exit code and the answer: the lines from `run.py` on, after what a run tells on its way."""
    done = inside(arguments)
    said = done.stderr.splitlines()
    return done.returncode, said[next((at for at, line in enumerate(said) if line.startswith("run.py ")), 0):]


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_answered_in_a_line_that_names_the_fix(name: str, pairs: Path, tiny_model: Path, mess: Path,
                                                            alone: Path, tmp_path: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, answer = MISTAKES[name]
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)  # as on a machine without a GPU
    used = tmp_path / "used"
    (used / "checkpoints" / "step-00000004").mkdir(parents=True)
    (used / "config.json").write_text(json.dumps({"config": {"lr": 0.25, "model": str(tiny_model)}}))
    mixed = tmp_path / "mixed"
    (mixed / "checkpoints" / "step-theirs").mkdir(parents=True)
    (mixed / "config.json").write_text(json.dumps({"config": {"model": str(tiny_model), "dataset": str(pairs)}}))
    places = {"pairs": pairs, "model": tiny_model, "tmp": tmp_path, "used": used, "mess": mess, "alone": alone,
              "mixed_run": mixed, "picture": next((pairs / "images").iterdir())}
    filled = [argument.format(**places) for argument in arguments]
    command = "" if filled[0].startswith("-") else filled[0]
    filled += [] if "--out" in filled or command not in ("", "sweep") else ["--out", str(tmp_path / "out")]
    filled += [] if "--cache-dir" in filled or command not in ("", "sweep", "search", "eval", "check") else [
        "--cache-dir", str(tmp_path / "cache")]
    code, said = answered(filled)
    assert code == 2, said
    assert answer.format(**places) in "\n".join(said) and 1 <= len(said) <= 3, said


def test_there_are_forty_mistakes_over_all_commands() -> None:
    from engine.config.cli import COMMANDS

    assert len(MISTAKES) >= 40
    assert set(COMMANDS) - {"demo"} == {
        arguments[0] if arguments[0] in COMMANDS else "train" for arguments, _ in MISTAKES.values()}


@pytest.mark.parametrize("flags, answer", [
    (["--model", "{model}", "--dataset", "nowhere"], "nowhere"), (["--model", "nowhere", *DATA[2:]], "nowhere"),
    ([*DATA, "--eval-splits", "tset"], "tset"), ([*DATA, "--probe", "nowhere"], "nowhere"),
    ([*DATA, "--batch-size", "38"], "37")])
def test_a_run_that_never_began_leaves_no_folder_behind(flags: list[str], answer: str, pairs: Path, tiny_model: Path,
                                                        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A typo in the data is said before a model loads, and `runs/` does not fill up with empty folders."""
    if "--batch-size" not in flags and "nowhere" not in flags[1]:
        monkeypatch.setattr("engine.commands.train.load_model", lambda *_: pytest.fail("a model was loaded"))
    filled = [flag.format(model=tiny_model, pairs=pairs) for flag in flags]
    code, said = answered([*filled, "--out", str(tmp_path / "runs" / "a"), "--cache-dir", str(tmp_path / "cache")])
    assert code == 2 and answer in "\n".join(said) and not (tmp_path / "runs").exists(), said


@pytest.mark.parametrize("name, value", [("RANK", "abc"), ("RANK", ""), ("RANK", "1"), ("WORLD_SIZE", ""),
                                         ("LOCAL_RANK", "-1"), ("WORLD_SIZE", "2")])
def test_a_broken_environment_of_ranks_is_named(name: str, value: str, pairs: Path, tiny_model: Path, tmp_path: Path,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    """A job script that sets half of torchrun's variables gets no traceback, and no run that writes nothing."""
    monkeypatch.setenv(name, value)
    monkeypatch.setattr("time.sleep", lambda _: None)
    code, said = answered(["--model", str(tiny_model), "--dataset", str(pairs), "--out", str(tmp_path / "run")])
    assert code == 2 and len(said) == 1 and name in said[0] and not (tmp_path / "run").exists(), said


def test_a_missing_home_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers often run as a user without a home folder, where the default cache cannot lie."""
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    code, said = answered(["check", "--dataset", "d"])
    assert code == 2 and "--cache-dir" in said[0] and "HOME" in said[0], said


def test_ranks_that_cannot_meet_say_why() -> None:
    """Real processes, since joining a group is done once."""
    flags = ["--model", "m", "--dataset", "d", "--dist-timeout", "5"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        lost = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for env, answer in ((lost, "--master-port"), ({"WORLD_SIZE": "2"}, "torchrun --nproc-per-node")):
            done = run(flags, env=env)
            assert done.returncode == 2 and answer in done.stderr, done.stderr
            assert len(done.stderr.splitlines()) <= 3 and "Traceback" not in done.stderr
