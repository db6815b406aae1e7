"""Model folders broken as they are in the world: refused in one line naming file and fix, or loaded right.

When one of these fails, a user trains on random weights, on an empty tokenizer or on another model than the one named,
runs code that came with a model, or gets a traceback.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import inside
from safetensors.torch import load_file, save_file
from torch import Tensor

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1710540580\n"
Surgery = Callable[[Path], object]


def edit(name: str, **changes: Any) -> Surgery:
    """Change keys of a JSON file; `a__b` is the key b inside a, and ... removes a key."""
    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        for path, value in changes.items():
            *outer, key = path.split("__")
            inner = content
            for step in outer:
                inner = inner.setdefault(step, {})
            inner.pop(key, None) if value is ... else inner.update({key: value})
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return change


def write(name: str, text: str) -> Surgery:
    return lambda folder: (folder / name).write_text(text, encoding="utf-8")


def cut(name: str, share: float = 0.6) -> Surgery:
    """Keep the beginning of a file, as a copy over a line that broke."""
    return lambda folder: os.truncate(folder / name, int(os.path.getsize(folder / name) * share))


def remove(*names: str) -> Surgery:
    def unlink(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()
    return unlink


def weights(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Surgery:
    """Save other tensors than the model's."""
    def save(folder: Path) -> None:
        save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
    return save


def as_bin(content: Callable[[dict[str, Tensor]], Any] = dict) -> Surgery:
    """Weights as torch.save writes them, and no others."""
    def save(folder: Path) -> None:
        torch.save(content(load_file(folder / "model.safetensors")), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    return save


def sharded(folder: Path) -> None:
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2


def with_token(folder: Path, token: str = "<cat-toy>") -> None:
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([token])
    tokenizer.save_pretrained(folder)


def with_vocabulary_files(folder: Path) -> None:
    """vocab.json and merges.txt in place of tokenizer.json, as checkpoints of 2021 have them."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.model.save(str(folder))
    (folder / "tokenizer.json").unlink()


def with_old_preprocessor(folder: Path) -> None:
    """preprocessor_config.json as openai/clip-vit-base-patch32 has it."""
    content = {"crop_size": 32, "do_center_crop": True, "do_normalize": True, "do_resize": True,
               "feature_extractor_type": "CLIPFeatureExtractor", "resample": 3, "size": 32,
               "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
    (folder / "preprocessor_config.json").write_text(json.dumps(content))
    (folder / "processor_config.json").unlink()


def with_stored_truncation(folder: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=20)
    tokenizer.save(str(folder / "tokenizer.json"))


def without_end_of_text(folder: Path) -> None:
    """A tokenizer.json whose titles do not end with EOS."""
    edit("tokenizer.json", post_processor=None)(folder)
    edit("tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")(folder)


def another_family(kind: str) -> Surgery:
    def save(folder: Path) -> None:
        import transformers

        getattr(transformers, kind)().save_pretrained(folder)
    return save


def text_tower_alone(folder: Path) -> None:
    from transformers import CLIPTextModelWithProjection

    CLIPTextModelWithProjection.from_pretrained(folder).save_pretrained(folder)


def looped(name: str) -> Surgery:
    def link(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(folder / name)
    return link


def folder_loop(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.symlink_to(folder)


def a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("weights")


def both(*surgeries: Surgery) -> Surgery:
    return lambda folder: [surgery(folder) for surgery in surgeries]


def code(name: str) -> Surgery:
    """`auto_map` of a config names a class in a file that leaves a trace when it is run."""
    kinds = {"config.json": {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"},
             "tokenizer_config.json": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]},
             "processor_config.json": {"AutoProcessor": "evil.Evil", "AutoImageProcessor": "evil.Evil"}}
    def plant(folder: Path) -> None:
        edit(name, auto_map=kinds[name])(folder)
        (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Evil: pass\n")
    return plant


class Evil:
    """Pickled, it leaves a trace when it is loaded."""

    def __init__(self, trace: str) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.trace,)


def pickled_code(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(str(folder / "ran")), 2))
    (folder / "model.safetensors").unlink()


def zip_of_code(folder: Path) -> None:
    as_bin(lambda tensors: {**tensors, "logit_scale": Evil(str(folder / "ran"))})(folder)


def filled(part: str, value: float) -> Surgery:
    """One value in all weights whose names hold `part`."""
    return weights(lambda tensors: {name: torch.full_like(tensor, value) if part in name else tensor
                                    for name, tensor in tensors.items()})


def adapter(folder: Path) -> None:
    content = {"peft_type": "LORA", "base_model_name_or_path": "openai/clip-vit-base-patch32", "r": 16,
               "target_modules": ["q_proj", "v_proj"], "lora_alpha": 16}
    (folder / "adapter_config.json").write_text(json.dumps(content))


def sentence_transformers(*kinds: str) -> Surgery:
    modules = [{"idx": at, "name": str(at), "path": f"{at}_{kind}" if at else "",
                "type": f"sentence_transformers.models.{kind}"} for at, kind in enumerate(kinds)]
    return write("modules.json", json.dumps(modules))


MEAN, STD = "image_processor__image_mean", "image_processor__image_std"
SIDE = {"image_processor__size": {"shortest_edge": 48}, "image_processor__crop_size": {"height": 48, "width": 48}}
BROKEN: dict[str, tuple[Surgery, tuple[str, ...]]] = {  # what was done to a folder -> words of the answer
    # weights
    "no weights": (remove("model.safetensors"), ("no model.safetensors",)),
    "only another framework's weights": (lambda folder: (folder / "model.safetensors").rename(folder / "tf_model.h5"),
                                         ("no model.safetensors", "tf_model.h5")),
    "vision tower only": (weights(lambda t: {k: v for k, v in t.items() if k.startswith("vis")}),
                          ("model.safetensors", "missing", "logit_scale")),
    "no projections": (weights(lambda t: {k: v for k, v in t.items() if "projection" not in k}),
                       ("2 weights are missing", "text_projection.weight")),
    "names of a DDP wrapper": (weights(lambda t: {f"module.{k}": v for k, v in t.items()}),
                               ("missing", "module.logit_scale")),
    "weights that no CLIPModel has": (weights(lambda t: t | {"text_model.adapter.weight": torch.ones(2)}),
                                      ("0 weights are missing", "text_model.adapter.weight")),
    "projection_dim of another model": (edit("config.json", projection_dim=8),
                                        ("projection.weight", "asks for 8x", "config.json")),
    "vocabulary of another model": (edit("config.json", text_config__vocab_size=1000), ("token_embedding", "1000x24")),
    "a shard is absent": (both(sharded, lambda folder: next(folder.glob("model-00002-*")).unlink()),
                          ("model-00002-of", "model.safetensors.index.json lists")),
    "Git LFS pointer for weights": (write("model.safetensors", LFS), ("model.safetensors", "git lfs pull")),
    "Git LFS pointer for settings": (write("config.json", LFS), ("config.json", "git lfs pull")),
    "Git LFS pointer for the tokenizer": (write("tokenizer.json", LFS), ("tokenizer.json", "git lfs pull")),
    "empty weights": (write("model.safetensors", ""), ("model.safetensors is empty",)),
    "header of safetensors cut off": (cut("model.safetensors", 0.01), ("model.safetensors", "cut off")),
    "safetensors cut off": (cut("model.safetensors"), ("model.safetensors", "cut off")),
    "pytorch_model.bin cut off": (both(as_bin(), cut("pytorch_model.bin")), ("pytorch_model.bin", "damaged")),
    "NaN": (filled("text_projection", float("nan")), ("NaN", "text_projection.weight")),
    "overflow of a cast to fp16": (weights(lambda t: {k: (v * 1e6).half() for k, v in t.items()}),
                                   ("infinity", "fp16")),
    "collapsed titles": (filled("text_model.final_layer_norm.weight", 0), ("titles alike",)),
    "collapsed pictures": (filled("visual_projection", 0), ("pictures alike",)),
    "overflow in a tower": (filled("text_model.encoder.layers.1.mlp.fc2.weight", 3e38), ("titles as NaN",)),
    "an adapter": (adapter, ("adapter_config.json", "merge_and_unload")),
    # settings
    "empty config": (write("config.json", ""), ("config.json is empty",)),
    "config cut off": (cut("config.json"), ("config.json is cut off",)),
    "config is a list": (write("config.json", "[]"), ("config.json holds no settings",)),
    "a word for a number": (edit("config.json", text_config__hidden_size="wide"), ("config.json", "hidden_size")),
    "no config": (remove("config.json"), ("no config.json",)),
    "quantized": (edit("config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}),
                  ("config.json", "quantization_config (bitsandbytes)")),
    "flash attention": (edit("config.json", _attn_implementation="flash_attention_2"),
                        ("config.json", "flash_attention_2", "remove _attn_implementation")),
    "siglip2": (another_family("Siglip2Config"), ("'siglip2' model", "NaFlex")),
    "clipseg": (another_family("CLIPSegConfig"), ("'clipseg' model", "nearest")),
    "bert": (another_family("BertConfig"), ("'bert' model", "clip", "metaclip_2", "siglip")),
    "blip": (another_family("BlipConfig"), ("'blip' model",)),
    "text tower alone": (text_tower_alone, ("'clip_text_model' model",)),
    "Dense after the CLIPModel": (sentence_transformers("CLIPModel", "Dense"), ("modules.json", "Dense")),
    "modules.json is damaged": (write("modules.json", '{"a": 1}'), ("modules.json",)),
    "modules.json leads away": (write("modules.json", '[{"path": "../..", "type": "CLIPModel"}]'), ("modules.json",)),
    # titles
    "no tokenizer": (remove("tokenizer.json", "tokenizer_config.json"), ("tokenizer is missing", "merges.txt")),
    "vocab.json without merges.txt": (both(with_vocabulary_files, remove("merges.txt")),
                                      ("tokenizer is missing", "merges.txt")),
    "tokenizer cut off": (cut("tokenizer.json"), ("tokenizer.json is cut off",)),
    "tokenizer_config cut off": (cut("tokenizer_config.json"), ("tokenizer_config.json is cut off",)),
    "token beyond the embeddings": (with_token, ("<cat-toy>", "vocab_size")),
    "another EOS": (edit("config.json", text_config__eos_token_id=7), ("eos_token_id in config.json is 7",)),
    "another BOS": (edit("config.json", text_config__bos_token_id=7), ("bos_token_id in config.json is 7",)),
    "EOS is a list": (edit("config.json", text_config__eos_token_id=[519]), ("config.json", "eos_token_id=[519]")),
    "no EOS after titles": (without_end_of_text, ("'a title'", "tokenizer.json")),
    "highest id is not EOS": (both(with_token, edit("config.json", text_config__eos_token_id=2,
                                                    text_config__vocab_size=521),
                                   weights(lambda t: t | {(k := "text_model.embeddings.token_embedding.weight"):
                                                          torch.cat([t[k], t[k][:1]])})),
                              ("eos_token_id=2", "<cat-toy>", "write eos_token_id 519")),
    "no pad token": (edit("tokenizer_config.json", pad_token=None), ("pad_token", "tokenizer_config.json")),
    # pictures
    "crop of another model": (edit("processor_config.json", **SIDE), ("48x48", "image_size", "processor_config.json")),
    "no image processor": (remove("processor_config.json"), ("preprocessor_config.json",)),
    "mean is null": (edit("processor_config.json", **{MEAN: None}), ("image_mean", "processor_config.json")),
    "mean is absent": (edit("processor_config.json", **{MEAN: ...}), ("image_mean",)),
    "std is absent": (edit("processor_config.json", **{STD: ...}), ("image_std",)),
    "std is zero": (edit("processor_config.json", **{STD: [0, 0, 0]}), ("image_std",)),
    # code
    "code in config.json": (code("config.json"), ("config.json", "auto_map", "never run")),
    "code in tokenizer_config.json": (code("tokenizer_config.json"), ("tokenizer_config.json", "never run")),
    "code in processor_config.json": (code("processor_config.json"), ("processor_config.json", "never run")),
    "code as weights": (pickled_code, ("pytorch_model.bin", "never run")),
    "code among weights": (zip_of_code, ("pytorch_model.bin", "never run")),
    # places
    "folder is a link to itself": (folder_loop, ("link",)),
    "tokenizer is a pipe": (both(remove("tokenizer.json"), lambda folder: os.mkfifo(folder / "tokenizer.json")),
                            ("tokenizer.json is a named pipe",)),
    "weights are a device": (both(remove("model.safetensors"),
                                  lambda folder: (folder / "model.safetensors").symlink_to("/dev/zero")),
                             ("model.safetensors is a device",)),
    "settings of a gigabyte": (lambda folder: os.truncate(folder / "config.json", 1 << 30),
                               ("config.json has 1,073,741,824 bytes",)),
    "config.json is a link to itself": (looped("config.json"), ("config.json",)),
    "a file": (a_file, ("is a file", "config.json")),
}


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """A whole model to break."""
    return shutil.copytree(tiny_model, tmp_path / "model")


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_model_is_refused_in_one_line(name: str, folder: Path, tmp_path: Path, pairs: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is trained, nothing runs, nothing is asked on the terminal, and no run folder is left behind."""
    break_it, words = BROKEN[name]
    break_it(folder)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run code"))
    done = inside(["--model", folder, "--dataset", pairs, "--out", tmp_path / "out", "--cache-dir", tmp_path / "cache",
                   "--precision", "fp32"])
    said = done.stderr.splitlines()
    assert done.returncode == 2 and len(said) == 1, done.stderr
    assert all(word in said[0] for word in words) and str(folder) in said[0], said[0]
    assert not (tmp_path / "out").exists() and not (tmp_path / "cache").exists() and not (folder / "ran").exists()


def test_at_least_thirty_kinds_are_tried() -> None:
    assert len(BROKEN) >= 30


def with_old_names(folder: Path) -> None:
    """Buffers that CLIPModel saved until 2023."""
    weights(lambda tensors: tensors | {"text_model.embeddings.position_ids": torch.arange(77)[None],
                                       "vision_model.embeddings.position_ids": torch.arange(17)[None]})(folder)


def without_metadata(folder: Path) -> None:
    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors")


def as_sentence_transformers(folder: Path) -> None:
    """The layout of sentence-transformers/clip-ViT-L-14, which cuts titles at a length of its own."""
    inner = folder / "0_CLIPModel"
    inner.mkdir()
    for file in [path for path in folder.iterdir() if path.is_file()]:
        file.rename(inner / file.name)
    edit("tokenizer_config.json", model_max_length=...)(inner)
    write("sentence_bert_config.json", '{"max_seq_length": 16}')(folder)
    module = {"idx": 0, "name": "0", "path": "0_CLIPModel", "type": "sentence_transformers.models.CLIPModel"}
    write("modules.json", json.dumps([module]))(folder)


# What a folder may lack or have else, and is the same model all the same.
WHOLE: dict[str, Surgery] = {
    "as saved": lambda folder: None,
    "position_ids of older checkpoints": with_old_names,
    "safetensors without metadata": without_metadata,
    "shards": sharded,
    "pytorch_model.bin only": as_bin(),
    "no model_max_length": edit("tokenizer_config.json", model_max_length=...),
    "absurd model_max_length": edit("tokenizer_config.json", model_max_length=1000000000000000019884624838656),
    "model_max_length too small": edit("tokenizer_config.json", model_max_length=5),
    "model_max_length too large": edit("tokenizer_config.json", model_max_length=512),
    "truncation and padding stored": with_stored_truncation,
    "padding on the left": edit("tokenizer_config.json", padding_side="left", truncation_side="left"),
    "vocab.json and merges.txt only": with_vocabulary_files,
    "old preprocessor_config.json": with_old_preprocessor,
    "all files of 2021": both(as_bin(), with_vocabulary_files, with_old_preprocessor),
    "a sentence-transformers folder": as_sentence_transformers,
    "EOS of 2021": edit("config.json", text_config__eos_token_id=2, text_config__bos_token_id=0),
    "pad token is another one": edit("tokenizer_config.json", pad_token="!"),
    "no tokenizer class": edit("tokenizer_config.json", tokenizer_class=...),
    "eager attention": edit("config.json", _attn_implementation="eager"),
}
TITLES = ["3 red circles", "NA", "café 🎬 مرحبا", "many words " * 200]


@pytest.mark.parametrize("name", WHOLE)
def test_what_is_exported_embeds_alike_everywhere(name: str, folder: Path, tiny_model: Path, pairs: Path,
                                                  tmp_path: Path) -> None:
    """ours = transformers = sentence-transformers = the whole folder's embeddings, titles beyond 77 tokens included."""
    from PIL import Image
    from sentence_transformers import SentenceTransformer
    from transformers import CLIPModel, CLIPProcessor

    from engine.clip.loading import load_clip
    from engine.publish.export import Origin, Tuned, export

    WHOLE[name](folder)
    clip = load_clip(str(folder))
    ours, wanted = embedded(str(folder), pairs), embedded(str(tiny_model), pairs)
    torch.testing.assert_close(ours, wanted, atol=1e-6, rtol=0)
    export(clip, tmp_path / "out", Tuned({"text_projection.weight": clip.model.text_projection.weight},
                                         Origin(str(folder), "", "", "pairs")), "")
    torch.testing.assert_close(embedded(str(tmp_path / "out"), pairs), wanted, atol=1e-6, rtol=0)
    images = [Image.open(path) for path in pictures(pairs)]
    with torch.no_grad():
        model, processor = CLIPModel.from_pretrained(tmp_path / "out"), CLIPProcessor.from_pretrained(tmp_path / "out")
        assert processor.tokenizer.model_max_length == 77
        out = model(**processor(text=TITLES, images=images, return_tensors="pt", padding=True, truncation=True))
    peer = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    for theirs in (torch.cat([out.image_embeds, out.text_embeds]),
                   torch.cat([torch.from_numpy(peer.encode(inputs, normalize_embeddings=True))
                              for inputs in (images, TITLES)])):
        torch.testing.assert_close(theirs[len(images):], wanted[len(images):], atol=1e-5, rtol=0)
        torch.testing.assert_close(theirs, wanted, atol=2e-3, rtol=0)  # pixels may differ by 2/255


def pictures(pairs: Path) -> list[Path]:
    return sorted((pairs / "images").iterdir())[:3]


def embedded(model: str, pairs: Path) -> Tensor:
    """Our embeddings of some pictures and of TITLES."""
    from data.images.decode import collate_tokens, decode_image, tokenize
    from engine.clip.model import ModelOptions, open_model

    parts = open_model(model, ModelOptions(precision="fp32"), torch.device("cpu"))
    clip, spec = parts.clip, parts.clip.spec
    pixels = torch.stack([torch.from_numpy(decode_image(path.read_bytes(), spec)) for path in pictures(pairs)])
    tokens = collate_tokens(tokenize(clip.tokenizer, TITLES, clip.max_tokens), clip.tokenizer.pad_token_id)
    with torch.no_grad():
        return torch.cat([parts.head.image(parts.towers.image(pixels)), parts.head.text(parts.towers.text(tokens))])
