"""What holds over all scripts: same name, same code; the header of a lone copy lists what it imports; the JSON pair is known."""

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, environment, finish, start

SCRIPTS = sorted(path for path in ROOT.glob("*_*.py") if path.read_text().startswith("# /// script"))
# The parts of a script: every one has its own. Any other name that two scripts define is the same code in both.
ROLES = set(
    "Config Data Base Sizes load_data open_base open_model open_codec get_batch sizes_of plan_of advice "
    "evaluate evaluate_at held_out_loss final_results train train_steps save export card_of sample sample_clips generate predict "
    "sample_prompt main".split()
)
PACKAGES = {
    "bs4": "beautifulsoup4",
    "cv2": "opencv-python-headless",
    "PIL": "pillow",
    "rouge_score": "rouge-score",
}  # where the distribution has another name than the module


def definitions(source: str) -> dict[str, str]:
    """{name: code without comments and layout} of the functions and classes at the top level."""
    return {
        node.name: ast.dump(node)
        for node in ast.parse(source).body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
    }


def differing(sources: dict[str, str]) -> list[str]:
    seen: dict[str, tuple[str, str]] = {}
    wrong = []
    for script, source in sources.items():
        for name, code in definitions(source).items():
            first, other = seen.setdefault(name, (script, code))
            if code != other and name not in ROLES:
                wrong.append(f"{name}: {first} and {script}")
    return wrong


def imported(tree: ast.AST) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names) - {"common", "demos"}


def imported_with(path: Path) -> set[str]:
    """What a script imports, and those definitions of common.py that it comes to"""
    own, shared = (ast.parse(file.read_text()) for file in (path, ROOT / "common.py"))
    defined = {node.name: node for node in shared.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    names = [node for node in shared.body if node not in defined.values()]
    reached: set[str] = set()
    todo = [own, *names]
    packages = set().union(*map(imported, todo))
    while todo:
        words = {node.id for node in ast.walk(todo.pop()) if isinstance(node, ast.Name)}
        new = (words & defined.keys()) - reached
        reached |= new
        todo += [defined[name] for name in new]
        packages |= set().union(*(imported(defined[name]) for name in new))
    return packages


def test_there_are_scripts():
    assert "t2v_ddpm.py" in [path.name for path in SCRIPTS]


def test_two_definitions_of_one_name_are_the_same_code():
    assert not differing({path.name: path.read_text() for path in SCRIPTS})


def test_no_name_is_exempt_that_need_not_be():
    """Each part is there in two scripts at least, and differs."""
    sources = [definitions(path.read_text()) for path in SCRIPTS]
    for name in ROLES:
        assert len({source[name] for source in sources if name in source}) > 1, (
            f"{name}: take it out of ROLES"
        )


def test_the_check_above_can_fail():
    a, b = "def f(x):\n    return x  # why\n", "def f(x):\n    return x + 1\n"
    assert differing({"a": a, "b": a.replace("  # why", "")}) == []
    assert differing({"a": a, "b": b}) == ["f: a and b"]


@pytest.mark.parametrize("arguments", [["format", "--check", "--quiet"], ["check", "--quiet"]])
def test_format_and_lint(arguments):
    done = subprocess.run(
        ["ruff", *arguments, "."], cwd=ROOT, capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 0, done.stdout[-3000:]


def test_common_keeps_what_three_scripts_use():
    """What one script uses alone stands there; DEMOS are scripts too, for what they draw with."""
    used = [set(re.findall(r"\w+", path.read_text())) for path in [*SCRIPTS, *(ROOT / "demos").glob("*.py")]]
    inside = (ROOT / "common.py").read_text()
    for name in definitions(inside):
        users = sum(name in words for words in used)
        assert users > 1 or len(re.findall(rf"\b{name}\b", inside)) > 1, f"{name}: only {users} use it"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_header_lists_what_a_lone_copy_imports(path):
    header = path.read_text().split("# ///\n")[0]
    listed = packages(re.findall(r'"([^"]+)"', header.split("dependencies")[1]))
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    tested = packages([line.split("#")[0].strip() for line in lines if line[:1].isalpha()])
    # asked for by a flag, and then the message says what to install; `networks` is LongCat-Audio-Codec's checkout,
    # which gets a stand-in where torchaudio is not there
    optional = {"wandb", "pyarrow", "datasets", "bitsandbytes", "networks", "torchaudio"}
    needed = {PACKAGES.get(name, name).lower() for name in imported_with(path)}
    through_transformers = {"torchvision", "num2words", "pillow"} if path.name == "llava_vtt.py" else set()
    assert needed - optional <= listed.keys() <= needed | through_transformers
    assert listed.items() <= tested.items(), "the pins of a lone copy are the tested ones"
    # a lone copy has no demos/, so its header need not list what they import
    for world in (ROOT / "demos").glob("*.py"):
        assert {
            PACKAGES.get(name, name).lower() for name in imported(ast.parse(world.read_text()))
        } <= tested.keys()


def packages(specs: list[str]) -> dict[str, str]:
    """{name: which versions}"""
    return {re.split("[<>=]", spec)[0].lower(): re.sub("^[^<>=]+", "", spec) for spec in specs}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_lone_copy_says_what_its_demo_lacks(path, tmp_path):
    for name in (path.name, "common.py"):
        shutil.copy(ROOT / name, tmp_path)
    code, output = finish(start([sys.executable, path.name, "--demo", "--output_dir", "run"], tmp_path))
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and "Traceback" not in output, output
    assert re.search(rf"/demos/\w+\.py is not there: .* folder demos/ .* {path.name} comes from", errors[0])
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


@pytest.mark.parametrize("name", ["ds_zero2.json", "ds_zero3_offload.json"])
def test_deepspeed_knows_every_key(name):
    from deepspeed.runtime import constants
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    config = json.loads((ROOT / name).read_text())
    known = {value for value in vars(constants).values() if isinstance(value, str)} | {
        "zero_optimization",
        "zero_force_ds_cpu_optimizer",
    }
    assert set(config) <= known
    fields = DeepSpeedZeroConfig.model_fields
    assert set(config["zero_optimization"]) <= set(fields) | {field.alias for field in fields.values()}
    assert "cpu_offload" not in json.dumps(config), "deprecated spelling"
