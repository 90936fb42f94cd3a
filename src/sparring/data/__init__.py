"""Datasets: read, checked and kept on disk. Importing this loads neither torch nor a model library."""

from sparring.data.checks import check
from sparring.data.dataset import Dataset
from sparring.data.findings import Finding, Report
from sparring.data.formats import read_qrels, save_beir, save_dpr, save_msmarco, write_qrels
from sparring.data.loading import default_cache, load
from sparring.data.table import TextTable, normalise
from sparring.data.trec import read_run, write_run

__all__ = [
    "Dataset",
    "Finding",
    "Report",
    "TextTable",
    "check",
    "default_cache",
    "load",
    "normalise",
    "read_qrels",
    "read_run",
    "save_beir",
    "save_dpr",
    "save_msmarco",
    "write_qrels",
    "write_run",
]
