"""The house: who may import whom, and what `import questlib` needs.

CONTRIBUTING.md describes the rooms.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import questlib

ROOT = Path(__file__).resolve().parents[1]
CORE = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]

# From the ground up. A module may import from its own floor and from those below it.
FLOORS: dict[str, list[set[str]]] = {
    "questlib": [
        {"errors", "registration"},
        {"files"},
        {"integrity"},
        {"config", "config_groups", "presets", "versions"},
        {"distributed", "stage_cache", "alignment", "capture", "denoisers"},
        {"kernels"},
        {"quantization"},
        {"diffusion"},
        {"calls", "minimization"},
        {"recording"},
        {"trajectories"},
        {"calibration"},
        {"observers"},
        {"baselines"},
        {"adaround"},
        {"finetuning"},
        {"packing"},
        {"diffusers_quantizer"},
        {"post_training"},
        {"integer"},
        {"checkpoint", "hub"},
        {"arguments"},
        {"__init__", "__main__"},
    ],
    "reproduce": [
        {"environment"},
        {"provenance", "store"},
        {"models"},
        {"evaluation"},
        # The embedded models are measured when they are trained.
        {"models.minis", "models.__main__"},
        {"scales", "datasets", "choices", "parameters", "unet_counts"},
        {"tables"},
        {"plan", "results", "paired_test", "verdicts", "kept_seeds"}
        | {"table_results", "timing", "agreement", "row_engine"},
        {"pipeline", "sample", "seed_run"},
        {"figures"},
        {"reporting"},
        {"estimate", "table_run", "opening", "workers"},
        {"notebooks"},
        {"__init__", "__main__"},
    ],
}

# What questlib uses where it is there: triton comes with torch on Linux; pandas, scipy and
# transformers are imported inside functions only. A run without them is a test below.
OPTIONAL = {"pandas", "scipy", "transformers", "triton"}


# ---- what each module imports, at its head or inside a function ----


@cache
def sources() -> dict[str, ast.Module]:
    """Every module of the two packages by its dotted name; a package is PACKAGE.__init__."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): ast.parse(path.read_text())
        for package in FLOORS
        for path in sorted((ROOT / package).rglob("*.py"))
    }


def imported_names(tree: ast.AST) -> Iterator[str]:
    """Dotted names that are imported, outside `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{ast.unparse(node)}: imports are absolute here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        yield from imported_names(node)


def module_of(name: str) -> str:
    """The module of an imported name: the name itself, or what it is taken from."""
    for candidate in (name, f"{name}.__init__", name.rpartition(".")[0]):
        if candidate in sources():
            return candidate
    return f"{name.rpartition('.')[0]}.__init__"


@cache
def graph() -> dict[str, set[str]]:
    """Module -> modules of the two packages that it imports."""
    return {
        name: {
            module_of(imported)
            for imported in imported_names(tree)
            if imported.split(".")[0] in FLOORS
        }
        - {name}
        for name, tree in sources().items()
    }


def floor(module: str) -> int:
    """The floor of the longest of a module's prefixes that stands in FLOORS."""
    package, *parts = module.split(".")
    for end in range(len(parts), 0, -1):
        room = ".".join(parts[:end])
        for number, rooms in enumerate(FLOORS[package]):
            if room in rooms:
                return number
    raise AssertionError(f"{module} has no floor: give its room one in FLOORS")


def test_no_module_imports_from_a_higher_floor():
    upwards = [
        f"{module} imports {imported}"
        for module, found in graph().items()
        for imported in sorted(found)
        if module.split(".")[0] == imported.split(".")[0] and floor(imported) > floor(module)
    ]
    assert not upwards, "\n".join(upwards)


def test_questlib_imports_nothing_of_reproduce():
    found = {m: n for m, n in graph().items() if m.startswith("questlib.")}
    assert not [m for m, n in found.items() if any(x.startswith("reproduce.") for x in n)]


def test_no_imports_run_in_a_circle():
    try:
        TopologicalSorter(graph()).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")


def test_every_floor_has_its_rooms():
    for package, floors in FLOORS.items():
        for room in set().union(*floors):
            path = ROOT / package / room.replace(".", "/")
            assert path.is_dir() or path.with_suffix(".py").is_file(), f"{package}.{room} is gone"


def test_questlib_imports_its_core_dependencies_alone():
    core = {canonicalize_name(Requirement(line).name) for line in CORE}
    known = packages_distributions()
    for module, tree in sources().items():
        if module.startswith("questlib."):
            for name in imported_names(tree):
                top = name.split(".")[0]
                if top not in {*sys.stdlib_module_names, *FLOORS, *OPTIONAL}:
                    homes = {canonicalize_name(d) for d in known.get(top, [top])}
                    assert homes & core, f"{module} imports {top}, no core dependency"


def test_no_module_of_questlib_has_the_name_of_a_public_function():
    """`import questlib.finetune` would give the function, and hide the module."""
    tops = {module.split(".")[1] for module in sources() if module.startswith("questlib.")}
    assert not tops & set(questlib.__all__)


def test_every_public_name_is_there():
    assert all(hasattr(questlib, name) for name in questlib.__all__)
    assert set(questlib.__all__) <= set(dir(questlib))
    with pytest.raises(AttributeError):
        questlib.no_such_name  # noqa: B018


def test_no_tuple_of_calls_stands_as_a_statement():
    """One statement a line: `a(), b()` is two."""
    folders = (*FLOORS, "tests", "benchmarks")
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for folder in folders
        for path in sorted((ROOT / folder).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Tuple)
    ]
    assert not found, ", ".join(found)


# ---- what `import questlib` loads, and what it needs ----


def python(code: str, folder: Path | None = None) -> str:
    """What `code` prints in a new interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_questlib_loads_nothing_heavy():
    heavy = "torch diffusers pydantic pandas matplotlib transformers PIL reproduce"
    code = f"import sys, questlib; print([m for m in {heavy.split()} if m in sys.modules])"
    assert python(code) == "[]"


@pytest.mark.parametrize("package", ["questlib", "reproduce"])
def test_help_loads_no_torch(package):
    code = f"""
import sys
from {package}.__main__ import main
try:
    main(["--help"])
except SystemExit as error:
    assert not error.code
print()
print([m for m in ("torch", "diffusers", "pandas", "matplotlib") if m in sys.modules])
"""
    assert python(code).splitlines()[-1] == "[]"


# Modules of the extras, and one that only POSIX systems have. PIL, yaml, psutil and numpy are not
# here: diffusers, accelerate and huggingface_hub need them.
EXTRAS = """
    IPython fcntl ipykernel jupyter latex2mathml matplotlib nbclient nbconvert nbformat open_clip
    pandas papermill peft timm tokenizers torch_fidelity torchvision transformers
""".split()

THIN = f"""
import sys


class Without:
    '''A finder of modules that does not find those of the extras.'''

    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        hidden = name.split(".")[0] in {EXTRAS!r}
        return None if hidden else self.finder.find_spec(name, path, target)


sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""

WHOLE_RUN = """
import questlib

for name in questlib.__all__:
    getattr(questlib, name)

import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

torch.manual_seed(0)
unet = UNet2DModel(
    sample_size=8,
    layers_per_block=1,
    block_out_channels=(8, 16),
    norm_num_groups=4,
    attention_head_dim=8,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
)
DDIMPipeline(unet, DDIMScheduler()).save_pretrained("pipeline")
assert "reproduce" not in sys.modules
pipe = questlib.load_pipeline("pipeline")

config = questlib.QuantConfig.preset(
    "quest", adaround_iters=2, tla_iters=2, cma_iters=2, batch_size=2, recon_samples=4
)
calib = questlib.calibrate(pipe, 2, 4)
quantized = questlib.quantize(pipe.unet, config, calib)
questlib.finetune(quantized, pipe.unet, calib, config)
questlib.save_pretrained(quantized, "quantized")
loaded = questlib.from_pretrained("quantized")

x = torch.randn(1, 3, 8, 8)
with torch.no_grad():
    simulated = loaded(x, 5).sample
    integer = questlib.convert(questlib.from_pretrained("quantized"), "reference")(x, 5).sample
print(bool((simulated - integer).abs().max() < 0.05 * simulated.abs().max()))
"""


def test_questlib_works_without_the_extras(tmp_path):
    """A whole run, from a pipeline's folder to integers, with the core dependencies alone."""
    assert python(THIN + WHOLE_RUN, tmp_path).splitlines()[-1] == "True"
