"""What holds over all scripts: same name, same code; the header of a lone copy lists what it imports; the JSON pair is known."""

import ast
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from conftest import ROOT, finish, start

SCRIPTS = sorted(path for path in ROOT.glob("*_*.py") if path.read_text().startswith("# /// script"))
# What each script has of its own under a name that all of them use.
OWN = set(
    "Config Data Base Batches Clip Collator Row Sizes open_base open_codec load_data read_manifest core "
    "layouts machine_table report curriculum get_batch load_weights lora_config with_adapter activation_bytes generate_answers "
    "scores answer_loss measure plan train train_steps save evaluate evaluate_at held_out_loss export publish show push_data "
    "write_card generate sample sample_pixels sample_prompt predict main".split()
)
PACKAGES = {
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
            if code != other and name not in OWN:
                wrong.append(f"{name}: {first} and {script}")
    return wrong


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names) - {"common", "demos"}


def test_there_are_scripts():
    assert "t2v_ddpm.py" in [path.name for path in SCRIPTS]


def test_two_definitions_of_one_name_are_the_same_code():
    assert not differing({path.name: path.read_text() for path in SCRIPTS})


def test_the_check_above_can_fail():
    a, b = "def f(x):\n    return x  # why\n", "def f(x):\n    return x + 1\n"
    assert differing({"a": a, "b": a.replace("  # why", "")}) == [] and differing({"a": a, "b": b}) == [
        "f: a and b"
    ]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_header_lists_what_a_lone_copy_imports(path):
    header = path.read_text().split("# ///\n")[0]
    listed = {
        re.split("[<>=!;]", name)[0].lower()
        for name in re.findall(r'"([^"]+)"', header.split("dependencies")[1])
    }
    # asked for by a flag, and then the message says what to install; `networks` is LongCat-Audio-Codec's checkout
    optional = {"wandb", "pyarrow", "datasets", "bitsandbytes", "networks"}
    needed = {PACKAGES.get(name, name).lower() for name in imported(path) | imported(ROOT / "common.py")}
    assert needed - optional <= listed <= needed
    pinned = {
        re.split("[<>=; ]", line)[0].lower()
        for line in (ROOT / "requirements.txt").read_text().splitlines()
        if line[:1].isalpha()
    }
    assert listed <= pinned
    for world in (ROOT / "demos").glob(
        "*.py"
    ):  # a lone copy has none, so its header need not list what they import
        assert {PACKAGES.get(name, name).lower() for name in imported(world)} <= pinned


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_lone_copy_says_what_its_demo_lacks(path, tmp_path):
    for name in (path.name, "common.py"):
        shutil.copy(ROOT / name, tmp_path)
    code, output = finish(start([sys.executable, path.name, "--demo", "--output_dir", "run"], tmp_path))
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and "Traceback" not in output, output
    assert re.search(rf"/demos/\w+\.py is not there: .* folder demos/ .* {path.name} comes from", errors[0])
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


def test_common_has_only_what_scripts_use():
    source = (ROOT / "common.py").read_text()
    used = set(re.findall(r"\w+", "\n".join(path.read_text() for path in SCRIPTS)))
    for name in definitions(source):
        assert name in used or len(re.findall(rf"\b{name}\b", source)) > 1, f"common.py: {name} is not used"


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
