"""The wheel: what is in it, and that it works where the repository is not."""

import os
import site
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TINY

CHECKOUT = Path(__file__).resolve().parents[1]
if not all((CHECKOUT / name).exists() for name in ("pyproject.toml", "gptlab/__init__.py", "conf/train.yaml")):
    pytest.skip("there is no checkout around these tests to build a wheel from", allow_module_level=True)


def succeed(*command: str | Path, **settings) -> str:
    """Run a command that must succeed; returns what it printed."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, **settings)
    assert done.returncode == 0, f"{done.args}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    offline = ("--no-deps", "--no-index", "--no-build-isolation")
    succeed(sys.executable, "-m", "pip", "wheel", *offline, "-w", folder, CHECKOUT)
    (path,) = folder.glob("gptlab-*.whl")
    return path


@pytest.fixture
def installed(wheel, tmp_path) -> Callable[..., str]:
    """Run the Python of a fresh environment that holds the wheel, in an empty folder."""
    venv, folder = tmp_path / "venv", tmp_path / "empty"
    folder.mkdir()
    succeed(sys.executable, "-m", "venv", "--without-pip", venv)
    succeed(sys.executable, "-m", "pip", "--python", venv, "install", "--no-deps", "--no-index", wheel)
    (packages,) = venv.glob("lib/python*/site-packages")
    # The dependencies, after the wheel on sys.path; .pth files there, as an editable install leaves, are not read.
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment["GPTLAB_DATA"] = str(tmp_path / "data")
    return lambda *arguments: succeed(venv / "bin/python", *arguments, cwd=folder, env=environment)


def test_the_wheel_holds_the_package_and_all_of_conf(wheel):
    """A YAML file that is left out would be missed only by those who install the wheel."""
    files = {path for path in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in path}
    conf = {f"gptlab/{path.relative_to(CHECKOUT)}" for path in (CHECKOUT / "conf").rglob("*") if path.is_file()}
    code = {
        str(path.relative_to(CHECKOUT)) for path in (CHECKOUT / "gptlab").rglob("*") if path.suffix in (".py", ".md")
    }
    assert files == conf | code  # and no tests


def test_an_installed_wheel_composes_trains_and_samples(installed, tmp_path):
    """From a folder that knows nothing of the repository; the editable gptlab of this environment would not do."""
    where = installed("-c", "import gptlab, gptlab.config; print(gptlab.__file__, gptlab.config.CONF, sep='\\n')")
    for path in where.splitlines():
        assert Path(path).resolve().is_relative_to(tmp_path.resolve() / "venv"), path
    assert "n_layer: 3" in installed("-m", "gptlab.train", *TINY, "--cfg", "job")
    assert "bits per byte" in installed("-m", "gptlab.train", *TINY, "hydra.run.dir=run")
    # Its Hydra plugins are found, and jobs import it: sampling needs no training.
    swept = installed("-m", "gptlab.sample", "-m", "ckpt=run", "prompt=The", "max_new_tokens=0", "seed=1")
    assert swept.startswith("The")
    prompt = "The wheel"
    assert installed("-m", "gptlab.sample", "ckpt=run", f"prompt={prompt}", "max_new_tokens=9").startswith(prompt)
