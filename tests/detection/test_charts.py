# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""A report is drawn for records of every kind."""

import pytest
from PIL import Image

from peft_sdpt.detection.charts import draw_report, most_frequent, worst_and_best
from tests.helpers.detectors import run_python


def make_record(num_classes=3, trained=True, **changes):
    def metrics(value):
        return {"AP": value, "AP50": value, "AP75": value}

    classes = {
        f"class {i}": {"objects": 1, "before": metrics(i / num_classes), "after": metrics(1.0) if trained else None}
        for i in range(num_classes)
    }
    return {
        "best": {**metrics(0.5), "step": 2} if trained else None,
        "classes": classes,
        "errors": [{"error": "missed", "true": "class 0", "predicted": None, "count": 2}],
        "at_threshold": {"threshold": 0.3},
        "precision_recall": {"recall": [0, 1], "before": [1, 0], "after": [1, 1] if trained else None},
        "curves": {
            "loss": {"step": [1, 2], "value": [2.0, 1.0]} if trained else {"step": [], "value": []},
            "validation": [{**metrics(0.5), "step": 2}] if trained else [],
        },
        **changes,
    }


# Names that could fail with fonts, in formulas and legends of Matplotlib, or in files.
STRANGE_NAMES = (
    *(
        "$x",
        "犬 $",
        r"$\frac{",
        r"C:\new",
        "_cat",
        "a\nb",
        "\x00",
        "\x1b[31m",
        "\ud800",
        "\u2028",
        "😀",
        "👩‍👩‍👧",
        "شجرة",
    ),
    *("{true}", "%s", "a" * 5000, "&lt;", "<script>", "^_^", " "),
)
STRANGE = {name: {"objects": 1, "before": {"AP": i / 20}, "after": {"AP": 0.2}} for i, name in enumerate(STRANGE_NAMES)}
STRANGE_ERRORS = [
    {"error": "confused", "true": name, "predicted": other, "count": 2}
    for name, other in zip(STRANGE_NAMES, STRANGE_NAMES[::-1], strict=True)
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "record",
    [
        make_record(),
        make_record(trained=False),
        make_record(200),
        make_record(1, errors=[]),
        make_record(classes=STRANGE, errors=STRANGE_ERRORS[:4]),
        make_record(classes=STRANGE, errors=STRANGE_ERRORS[4:8]),
        make_record(classes=STRANGE, errors=STRANGE_ERRORS[8:]),
    ],
    ids=["trained", "evaluated", "many classes", "no errors", "strange names", "strange names 2", "strange names 3"],
)
def test_a_report_is_a_picture(record, tmp_path):
    draw_report(record, tmp_path / "report.png")
    with Image.open(tmp_path / "report.png") as picture:
        assert picture.format == "PNG" and min(picture.size) > 400
        assert len(picture.convert("RGB").getcolors(100000)) > 20
    draw_report(record, tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "report.png").read_bytes()


def test_drawing_keeps_no_state_and_importing_draws_nothing():
    code = """
import sys, pathlib, tempfile
from peft_sdpt.detection import draw_report
assert "matplotlib" not in sys.modules
from tests.detection.test_charts import make_record
draw_report(make_record(), pathlib.Path(tempfile.mkdtemp()) / "report.png")
assert "matplotlib" in sys.modules and "matplotlib.pyplot" not in sys.modules
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr


def test_the_worst_and_the_best_classes():
    classes = make_record(9, trained=False)["classes"]
    assert worst_and_best(classes, 9) == ([f"class {i}" for i in range(9)], [])
    assert worst_and_best(classes, 4) == (["class 0", "class 1", "class 7", "class 8"], ["class 7", "class 8"])
    # After training, classes are sorted by the AP after it. Classes that do not occur are left out.
    classes["class 8"]["after"] = {"AP": -1.0}
    classes["class 7"]["before"] = None
    assert worst_and_best(classes, 8)[0][:2] == ["class 8", "class 0"] and len(worst_and_best(classes, 8)[0]) == 8


def test_the_most_frequent_errors_of_each_kind():
    errors = [{"error": kind, "count": count} for count in (3, 2, 1) for kind in ("missed", "background", "confused")]
    chosen = most_frequent(errors, 2)
    assert list(chosen) == ["confused", "missed", "background"]
    assert all([error["count"] for error in of_kind] == [3, 2] for of_kind in chosen.values())
    assert most_frequent([], 2) == {}


def test_a_package_that_is_missing_is_named_at_once():
    """The error is not raised after hours of training, when the charts are drawn."""
    packages = ["matplotlib", "faster_coco_eval"]
    code = """
import importlib.util, sys
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == package else find_spec(name, *rest)
class Hidden:
    def find_spec(self, name, *rest):
        if name == package:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Hidden())
for package in sys.argv[1:]:
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        del sys.modules[name]  # imported for the one before
    try:
        import peft_sdpt.detection
    except ImportError as error:
        print(error)
    assert "peft_sdpt.detection" not in sys.modules
"""
    result = run_python(code, *packages)
    assert result.returncode == 0, result.stderr
    needs = "peft_sdpt.detection needs the package"
    assert result.stdout.splitlines() == [f"{needs} {name}: pip install peft_sdpt[detection]" for name in packages]
