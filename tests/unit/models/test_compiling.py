"""Compiled layers, by a backend that runs what it is given: one graph for all layers and lengths, the same results."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from test_packed import TEXTS, written_out
from torch import nn

from sparring.models import lean, load_ranker, load_retriever, packed
from sparring.models.compiling import compile_layers
from sparring.models.lean import lean_encoders

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch's own, while it traces


class Backend:
    """Counts the graphs."""

    def __init__(self) -> None:
        torch._dynamo.reset()
        self.graphs = 0

    def __call__(self, graph: Any, _: Any) -> Any:
        self.graphs += 1
        return graph.forward


def results(model: Any, budget: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Embeddings of all texts in chunks, and gradients of the weights."""
    model.zero_grad(set_to_none=True)
    rows = list(range(len(TEXTS)))
    inputs = model.batches(model.tokenize(TEXTS, "passage", None), rows, "passage", token_budget=budget).inputs
    assert len({one["input_ids"].shape for one in inputs}) > 1
    found = torch.cat([model.embed(one, "passage") for one in inputs])
    (found * torch.arange(1.0, found.numel() + 1).view(found.shape)).sum().backward()
    return found.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("without_padding", [False, True])
@pytest.mark.parametrize("kind", ["tiny_st", "tiny_st_unigram"])
def test_values_gradients_and_names_are_those_of_before(kind, without_padding, request, monkeypatch) -> None:
    model = load_retriever(request.getfixturevalue(kind)).eval()
    expected, slopes = results(model, 30)
    names, backend = list(model.state_dict()), Backend()
    if without_padding:
        monkeypatch.setattr(packed, "flash", torch.compiler.disable(written_out))
        monkeypatch.setattr(packed, "_packs", lambda _: True)
        monkeypatch.setattr(packed, "obstacle", lambda *_: "")
        monkeypatch.setattr(lean, "_device", lambda _: "cuda")
    encoder = next(module for module in model.modules() if type(module) in lean.ENCODERS)
    assert compile_layers(model, backend) == len(encoder.layer) > 1
    with lean_encoders(model) if without_padding else torch.enable_grad() as replaced:
        found, own = results(model, 30)
    assert not without_padding or replaced == 1
    parts = 2 if without_padding else 1  # attention as it is written out here is not traced, and cuts a layer in two
    assert 0 < backend.graphs <= 4 * parts, "layers and lengths share their code"
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert own.keys() == slopes.keys()
    for name, slope in slopes.items():
        assert float((own[name] - slope).norm()) <= 1e-5 * float(slope.norm()) + 1e-6, name
    assert list(model.state_dict()) == names
    assert all(layer._compiled_call_impl is None for layer in copy.deepcopy(encoder).layer)


def test_torchs_flash_attention_is_traced(tiny_st: Path, monkeypatch) -> None:
    """On tensors without numbers: one graph for both layers, with the operator in it, for chunks of several lengths."""
    (own,) = (m for m in load_retriever(tiny_st).modules() if type(m) in lean.ENCODERS)
    monkeypatch.setattr(packed, "_packs", lambda _: True)
    monkeypatch.setattr(packed, "obstacle", lambda *_: "")
    monkeypatch.setattr(lean, "_device", lambda _: "cuda")
    monkeypatch.setattr(lean, "_obstacle", lambda _: "")
    graphs: list[str] = []
    torch._dynamo.reset()
    with torch.device("meta"):
        encoder = type(own)(own.config).bfloat16().train()
    compile_layers(encoder, lambda graph, _: graphs.append(str(graph.graph)) or graph.forward)
    for lengths in ((5, 3, 2), (9, 9), (7, 1, 4, 2)):
        mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
        hidden = torch.empty(*mask.shape, own.config.hidden_size, device="meta", dtype=torch.bfloat16)
        with packed.rows_of(mask, hidden.device), lean_encoders(encoder):
            encoder(hidden.requires_grad_()).last_hidden_state.float().sum().backward()
    assert 0 < len(graphs) <= 2, "and perhaps one for lengths that differ"
    assert all("_flash_attention_forward" in graph for graph in graphs), "nothing is left out of a graph"


def test_what_is_no_encoder_of_berts_kind_is_left_alone(tiny_ce: Path) -> None:
    assert compile_layers(nn.Sequential(nn.Linear(2, 2)), Backend()) == 0
    assert compile_layers(load_ranker(tiny_ce), Backend()) > 0
