"""How the tests put a tiny encoder into a model folder."""

from __future__ import annotations

from pathlib import Path


def sentence_transformer(encoder: Path, folder: Path) -> Path:
    """Save a SentenceTransformer of an encoder: mean pooling, then normalisation."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    transformer = Transformer(str(encoder))
    modules = [transformer, Pooling(transformer.get_embedding_dimension(), "mean"), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(folder), create_model_card=False)
    return folder
