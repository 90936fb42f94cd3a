"""What must answer at once does not load torch, and importing configures nothing."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "sentence_transformers", "accelerate", "faiss", "matplotlib", "jinja2")
HEAVY += ("pymilvus", "milvus_lite", "grpc", "psycopg")
TELL = f"import sys; print(','.join(m for m in {HEAVY} if m in sys.modules))"


def loaded_after(code: str) -> str:
    """The heavy modules that a fresh process has loaded after ``code``, comma separated."""
    done = subprocess.run([sys.executable, "-c", f"{code}\n{TELL}"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""


@pytest.mark.parametrize(
    "code",
    [
        "import sparring; sparring.InputError",
        "import sparring; sparring.load, sparring.check, sparring.Dataset",
        "import sparring.data, sparring.data.demo",
        "import sparring.config, sparring.rundir, sparring.log, sparring.recipes.settings",
        "import sparring.stores.milvus, sparring.stores.pgvector, sparring.stores.folder",
        "import sparring.cli",
        "from click.testing import CliRunner\nfrom sparring.cli import main\n"
        "assert CliRunner().invoke(main, ['--help']).exit_code == 0",
        "from click.testing import CliRunner\nfrom sparring.cli import main\n"
        "assert CliRunner().invoke(main, ['train', '--help']).exit_code == 0",
    ],
)
def test_loads_no_torch(code: str) -> None:
    assert loaded_after(code) == ""


def test_importing_configures_nothing() -> None:
    code = (
        "import logging, os, warnings\n"
        "import numpy, pyarrow, tqdm, tabulate, click\n"
        "before = dict(os.environ), list(warnings.filters), list(logging.getLogger().handlers)\n"
        "import sparring, sparring.data, sparring.cli\n"
        "assert before == (dict(os.environ), list(warnings.filters), list(logging.getLogger().handlers))\n"
        "assert not logging.getLogger('sparring').handlers"
    )
    assert loaded_after(code) == ""


def test_unknown_attribute() -> None:
    import sparring

    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = sparring.trian


def test_every_public_name_is_there() -> None:
    import sparring

    assert all(getattr(sparring, name) is not None for name in sparring.__all__)
