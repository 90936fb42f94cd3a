"""A model's folder is data: none of its code is run, nothing pickled is read, no name in it leads elsewhere."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparring.models import load_ranker, load_retriever
from sparring.models.folder import note_export
from sparring.types import InputError

EVIL = "modeling_evil.Evil"
REFERENCES = {
    "AutoModel": EVIL, "AutoConfig": EVIL, "AutoTokenizer": [None, EVIL], "AutoModelForSequenceClassification": EVIL,
    "AutoProcessor": EVIL,
}  # fmt: skip


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return (Path.write_text, (self.canary, "unpickled"))


def change(file: Path, **values: Any) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**content, **values}))


def auto_map(folder: Path) -> None:
    for name in ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"):
        change(folder / name, auto_map=REFERENCES)


def unknown_architecture(folder: Path) -> None:
    change(folder / "config.json", auto_map=REFERENCES, model_type="evil", architectures=["Evil"])


def own_tokenizer(folder: Path) -> None:
    change(folder / "tokenizer_config.json", auto_map=REFERENCES, tokenizer_class="Evil")


def own_module(folder: Path) -> None:
    modules = json.loads((folder / "modules.json").read_text())
    modules.append({"idx": 9, "name": "9", "path": "", "type": EVIL})
    (folder / "modules.json").write_text(json.dumps(modules))


def own_first_module(folder: Path) -> None:
    (folder / "modules.json").write_text('[{"idx": 0, "name": "0", "path": "", "type": "modeling_evil.Evil"}]')


def library_module(folder: Path) -> None:
    (folder / "modules.json").write_text('[{"idx": 0, "name": "0", "path": "", "type": "subprocess.Popen"}]')


def activation(folder: Path) -> None:
    change(folder / "config.json", sentence_transformers={"activation_fn": "modeling_evil.Evil", "version": "5"})


def router(folder: Path) -> None:
    kind = "sentence_transformers.sentence_transformer.modules.Router"
    (folder / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": "", "type": kind}]))
    change(folder / "router_config.json", types={"q_0_E": "modeling_evil.Evil"}, structure={"query": ["q_0_E"]})


def generate(folder: Path) -> None:
    (folder / "custom_generate").mkdir()
    shutil.copy(folder / "modeling_evil.py", folder / "custom_generate" / "generate.py")
    change(folder / "generation_config.json", custom_generate=str(folder))


def nothing_more(folder: Path) -> None:
    """Only the pickles and the code beside sound files."""


HOSTILE: tuple[Callable[[Path], None], ...] = (
    auto_map, unknown_architecture, own_tokenizer, own_module, own_first_module, library_module, activation, router,
    generate, nothing_more,
)  # fmt: skip


def plant(folder: Path, canary: Path) -> None:
    """Code and pickles in every place from which a library has ever read them."""
    told = "from pathlib import Path\n" f"Path({str(canary)!r}).write_text('run')\n" "class Evil:\n    pass\n"
    for name in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py", "evil.py", "__init__.py",
                 "sitecustomize.py", "conftest.py"):  # fmt: skip
        (folder / name).write_text(told)
    pickled = ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "model.pkl")
    for name in pickled:
        (folder / name).write_bytes(pickle.dumps(Bomb(canary)))


@pytest.mark.parametrize("hostile", HOSTILE, ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", ["retriever", "ranker", "plain retriever", "plain ranker"])
def test_no_code_of_a_folder_is_run(
    hostile: Callable[[Path], None], kind: str, tiny_st: Path, tiny_ce: Path, tiny_bert: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder, canary = tmp_path / "model", tmp_path / "canary"
    source = tiny_bert if kind.startswith("plain") else tiny_st if kind == "retriever" else tiny_ce
    shutil.copytree(source, folder)
    if hostile is own_module and not (folder / "modules.json").exists():
        (folder / "modules.json").write_text("[]")
    plant(folder, canary)
    hostile(folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a library asked whether to trust the code"))
    try:
        (load_retriever if kind.endswith("retriever") else load_ranker)(folder)
    except InputError as error:
        loaded = False
        assert str(folder) in str(error)  # noqa: PT017
    else:
        loaded = True
    assert not canary.exists(), canary.read_text()
    if hostile is nothing_more:
        assert loaded, "sound files load, whatever lies beside them"


def test_weights_that_are_only_pickled_are_refused(tiny_bert: Path, tmp_path: Path) -> None:
    folder, canary = tmp_path / "model", tmp_path / "canary"
    shutil.copytree(tiny_bert, folder)
    plant(folder, canary)
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="no safetensors"):
        load_retriever(folder)
    assert not canary.exists()


def test_the_canary_works(tmp_path: Path) -> None:
    """What the tests above would see."""
    canary = tmp_path / "canary"
    pickle.loads(pickle.dumps(Bomb(canary)))
    assert canary.read_text() == "unpickled"
    canary.unlink()
    plant(tmp_path, canary)
    exec(compile((tmp_path / "evil.py").read_text(), "evil.py", "exec"), {})
    assert canary.read_text() == "run"


@pytest.mark.parametrize("path", ["../elsewhere", "/etc", "a/../../b", "..\\b", "a\0b"])
def test_names_in_a_folder_do_not_lead_out_of_it(path: str, tiny_st: Path, tmp_path: Path) -> None:
    whole = tmp_path / "model"
    shutil.copytree(tiny_st, whole)
    own = "sentence_transformers.sentence_transformer.modules.Transformer"
    modules = (whole / "modules.json").read_text()
    (whole / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": path, "type": own}]))
    with pytest.raises(InputError, match="outside its own folder"):
        load_retriever(whole)
    (whole / "modules.json").write_text(modules)
    change(whole / "tokenizer_config.json", chat_template=[{"name": path, "template": "x"}])
    with pytest.raises(InputError, match="outside its own folder"):
        load_retriever(whole)
    change(whole / "tokenizer_config.json", chat_template=None)
    (whole / "router_config.json").write_text(json.dumps({"types": {}, "structure": {path: []}}))
    with pytest.raises(InputError, match="outside its own folder"):
        load_retriever(whole)


@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "1_Pooling/config.json", "sparring.json"])
def test_an_exported_model_is_read_only_as_it_was_exported(
    name: str, damage: str, tiny_st: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_st, folder)
    note_export(folder)
    load_retriever(folder)
    if name == "sparring.json" and damage == "gone":
        return
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).unlink()
    if damage != "gone":
        (folder / name).write_bytes(content if damage == "flip" else content[: len(content) // 2])
    with pytest.raises(InputError, match="damaged") as error:
        load_retriever(folder)
    assert name in error.value.where
