"""Executes tutorial.ipynb from its first cell to its last, and stores it with its outputs and nothing of this machine.

    pip install -r extras/requirements-notebook.txt
    python -m extras.tutorial                           # after a change of the notebook or of what it shows

Does not handle: what is in the notebook (there); comparing new outputs with the stored ones (test_all.py).
"""

import argparse
import os
import tempfile
from pathlib import Path

from plumbing.errors import ModelError, in_words

ROOT = Path(__file__).parent.parent
FILE = ROOT / "tutorial.ipynb"
METADATA = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"}}        # a kernel writes its version and more into it


def execute():
    """The notebook (nbformat's), executed in a kernel of its own on one thread; raises what a cell raises."""
    try:
        import ipykernel  # noqa: F401
        import nbformat
        from nbclient import NotebookClient
    except ImportError as error:
        raise ModelError(f"{error.name} is missing: pip install -r extras/requirements-notebook.txt") from error
    notebook = nbformat.read(FILE, as_version=4)
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", record_timing=False,
                            coalesce_streams=True, extra_arguments=["--log-level=ERROR"],
                            resources={"metadata": {"path": str(ROOT)}})
    with tempfile.TemporaryDirectory() as folder:       # nobody's own start-up files, and none left behind
        env = os.environ | {"IPYTHONDIR": folder, "OMP_NUM_THREADS": "1"}
        env.pop("MPLBACKEND", None)
        client.execute(env=env)
    notebook.metadata = nbformat.from_dict(METADATA)
    return notebook


def make_parser():
    return argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)


def main(arguments=None):
    make_parser().parse_args(arguments)
    with in_words():
        notebook = execute()
        import nbformat
        nbformat.write(notebook, FILE)


if __name__ == "__main__":
    main()
