# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Run PEFT's own tests on SDPT: they are the statement of what a tuner has to do.

    pip download peft==0.21.2 --no-binary peft --no-deps --no-build-isolation && tar xf peft-0.21.2.tar.gz
    python -m tests.tools.peft_suite peft-0.21.2 [arguments of pytest, such as -k or -x]

Takes a source distribution or a checkout of the PEFT that is installed. Its test modules are read, translated
(`SUBSTITUTIONS`: what a LoRA layer is called becomes what ours is called) and run from a temporary folder, in which

* the test matrices hold SDPT cases (`CASES` on the detectors and the `FusionStack` of hosts.py);
* a `LoraConfig(...)` that a test writes itself makes an `SDPTConfig`;
* every `nn.Linear`, `nn.Conv2d` and so on of PEFT's toy models is a fusion attention, and these models run theirs in
  turn;
* `AutoModelForCausalLM` and its kin give a tiny detector.

`NOT_APPLICABLE` says which tests that leaves out, and why. The end of the output counts it all, class by class. Not
collected by a plain `pytest`.
"""

from __future__ import annotations

import ast
import dataclasses
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import peft
import pytest
import torch
from torch import nn
from transformers.models.grounding_dino.modeling_grounding_dino import GroundingDinoBiMultiHeadAttention

from peft_sdpt import SDPTConfig, SDPTLayer
from tests.helpers.detectors import D_MODEL, FusionStack, host_config, make_host, model_inputs, randomise

# Test module of PEFT to the classes of it that can be pointed at another tuner.
CLASSES = {
    "test_config.py": ("TestPeftConfig",),
    "test_custom_models.py": (
        "TestPeftCustomModel",
        "TestMultipleActiveAdapters",
        "TestRequiresGrad",
        "TestMixedAdapterBatches",
        "TestPeftFsdpStateDict",
    ),
    "test_initialization.py": ("TestLowCpuMemUsage", "TestNamingConflictWarning"),
    "test_low_level_api.py": ("TestInjectAdapterFromStateDict", "TestPeftStateDict", "TestGetBaseModelStateDict"),
    "test_tuners_utils.py": ("TestModelAndLayerStatus", "TestTunerStateDictKeyPrefixes"),
}
HELPERS = ("testing_common.py", "testing_utils.py")

# Regular expression for "Class::test[parameters]" to why that test says nothing about SDPT. The first match counts.
NOT_APPLICABLE = {
    r"modules_to_save_merging": "adapters with modules_to_save are not combined: trained modules have no sum",
    r"[Mm]erg": "prompts are extra keys and values: they never fold into weights, and merging is refused",
    r"trainable_token|trainble_token|TrainableToken|inside_auxiliary": "trainable_token_indices is no option of SDPT",
    r"target_parameters": "target_parameters is no option of SDPT",
    r"_dora|glora|gralora|monteclora|pvera|_mha|gpt2|_loha|prefix_tuning|adaption_prompt|_vera$": "of another tuner",
    r"requires_grad_(?!irr|modules|follows|lora_(same|diff)|model|set|small|large)": "of another tuner",
    r"PeftConfig::test_.*(ia3|adalora|prompt_encoder|lora|nested_config)": "of another tuner",
    r"rank_pattern|negative_weight|different_scaling|subtraction": "about LoRA's ranks and scaling",
    r"test_nb_params|status_with_modules_to_save|test_model_with_injected_layers": "counts the parameters of LoRA",
    r"requires_grad_irregular|requires_grad_model_irregular": "needs two kinds of parameters in a layer",
    r"embedding_layer|resized_embedding|sibling|seq_cls|automatic_modules|task_type_low": "needs a language model",
    r"no_needless_copy|stable_diffusion|automodel|transformers_model|cache_dir|PeftConfig::test_from_pretrained\[|"
    r"with_runtime_config": "needs a model or an adapter of the Hub",
    r"weight_conversion|prefix_removal": "needs a host whose weights transformers renames at loading",
    r"transformers_irregular": "names layers of a language model",
    r"with_bias|learnable_bias": "bias is no option of SDPT",
    r"save_pretrained_with_target_modules": "SDPT keeps target_modules as a list, so that two saves are the same file",
    r"mixed_model|rejects_duplicate.*True": "PeftMixedModel takes a fixed list of tuners",
    r"in_features_out_features|weight_bias_attributes": "a fusion attention has several projections, so no one weight",
    r"multihead|conv1d_emb|lora_conv2d|unsupported_layer|opt_timing|_gpu_": "about other layers or an accelerator",
    r"mixed.*multiple_modules_to_save": "PEFT mixes modules_to_save of plain layers; here they are fusion attentions",
    r"fsdp_wrapped.*mm_grounding_dino": "FSDP refuses the scalar parameters of the host",
}
if find_spec("sklearn") is None:
    NOT_APPLICABLE["test_from_peft_type"] = "makes a configuration of every tuner, and AdaMSS wants scikit-learn"
OTHER_TUNER = "a case of another tuner"
# Half-precision tests try merging at their end, when what is before has been checked; they count as passed.
ALL_BUT_MERGING = "all but merging was checked"

# On the text of the test modules, in this order. A layer of ours has prompts and gates where LoRA's has A and B.
SUBSTITUTIONS = (
    *(
        substitution
        for theirs, ours in (("lora_A", "sdpt_prompts"), ("lora_B", "sdpt_gates"))
        for substitution in (
            (rf'{theirs}\["default"\]\.weight', f'{ours}["default"]'),
            (rf"{theirs}\.(\w+)\.weight", rf"{ours}.\1"),
            (rf"{theirs}\.weight", ours),
            (rf"{theirs}\b", ours),
        )
    ),
    (r"assert sorted\(state_dict\) == expected", "assert sorted(state_dict) == sorted(expected)"),
    (r'"lora_"', '"sdpt_"'),
    (r"\blora_(foobar|head)", r"sdpt_\1"),
    (r'"lora\.\w+"', '"SDPTLayer"'),
    (r'"LoraModel"', '"SDPTModel"'),
    (r'"LORA"', '"SDPT"'),
    (r'^ *bias="lora_only",\n', ""),
    (r'target_modules=\["v_proj"\]', 'target_modules=["fusion_layer.attn"]'),
    (r'target_modules=\["q_proj", "v_proj"\]', 'target_modules=["layers.0.fusion_layer.attn"]'),
    (r'target_modules=\["k_proj", "out_proj"\]', 'target_modules=["layers.1.fusion_layer.attn"]'),
    (r"model\.decoder\.layers\.5\.self_attn\.q_proj", "model.encoder.layers.1.fusion_layer.attn"),
    (r"\bv_proj", "attn"),
    (r'"lm_head"', '"text_projection"'),
    (r"\btorch\.nn\.(?=Module|Linear|Embedding)", "nn."),
    # transformers 5.24 has this method only for PEFT 0.22 and later; it does the same.
    (r"\bmodel\.add_adapter\(config\)", "inject_adapter_in_model(config, model)"),
)
# Optional packages that the test modules, or what they import, want at their head.
STAND_INS = {
    "attr": ((r"^from peft\.tuners\.lora\.corda import preprocess_corda$", "preprocess_corda = None"),),
    "diffusers": (
        (r"^import diffusers$", "import peft as diffusers"),
        (r"^from diffusers import StableDiffusionPipeline$", "StableDiffusionPipeline = type('Absent', (), {})"),
    ),
    "parameterized": ((r"^from parameterized import parameterized$", "parameterized = peft_suite.Parameterized"),),
}


# The hosts: inputs of PEFT's custom models are one tensor X, outputs one tensor of log-probabilities a sample.


def tokens_of(X: torch.Tensor, dtype: torch.dtype, length: int, width: int) -> torch.Tensor:
    """Tokens `(B, length, width)` that depend on X and are of moderate size."""
    steps = torch.arange(1, length * width + 1, dtype=torch.float32).view(length, width)
    return torch.sin(X.float().flatten(1).mean(1)[:, None, None] * 0.1 + steps).to(dtype)


def dtype_of(host: nn.Module) -> torch.dtype:
    """Dtype of the host's projections, which is not that of its prompts."""
    return next(parameter.dtype for name, parameter in host.named_parameters() if "vision_proj" in name)


def generate(self: nn.Module, X: torch.Tensor, **kwargs) -> SimpleNamespace:
    """What PEFT's common tests call, through `PeftModel`, to compare outputs."""
    return SimpleNamespace(scores=[self(X)])


class Stack(FusionStack):
    """Fusion attentions in a plain module."""

    dtype = torch.float32
    generate = generate

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        dtype = dtype_of(self)
        scores = super().forward(tokens_of(X, dtype, 5, D_MODEL), tokens_of(X, dtype, 4, D_MODEL))
        return scores.mean(1).log_softmax(-1)


def as_custom_model(host: nn.Module, name: str) -> nn.Module:
    """A detector of transformers that takes X."""

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        inputs = model_inputs(len(X))
        pixels = inputs["pixel_values"] + X.float().flatten(1).mean(1)[:, None, None, None] / 100
        outputs = super(cls, self).forward(**{**inputs, "pixel_values": pixels.to(self.dtype)})
        # Six text tokens are there in every sample; the others have scores of minus infinity.
        return torch.cat([outputs.logits[..., :6], outputs.pred_boxes], dim=-1).mean(1).log_softmax(-1)

    # PEFT's tests set `dtype`, which a model of transformers computes.
    dtype = property(lambda self: next(self.parameters()).dtype, lambda self, value: None)
    cls = type(type(host).__name__, (type(host),), {"forward": forward, "dtype": dtype, "generate": generate})
    host.__class__ = cls
    host.config._name_or_path = host.name_or_path = name
    return host


class Hosts:
    """In place of `MockTransformerWrapper`."""

    @staticmethod
    def from_pretrained(model_id: str, dtype: torch.dtype | None = None) -> nn.Module:
        host = Stack().eval() if model_id == "FusionStack" else as_custom_model(make_host(model_id), model_id)
        # As every tuner leaves it: torch's kernels for frozen weights differ from those for trained ones in the last
        # digits, which would pass for a trace of the adapter.
        return host.requires_grad_(False).to(dtype or torch.float32)


def auto_model(name: str) -> type:
    """In place of an auto class of transformers: whatever is asked for, a tiny detector comes."""
    return type(name, (), {"from_pretrained": staticmethod(lambda *args, **kwargs: make_host())})


CASES = [
    (f"SDPT {model_id} {label}", model_id, SDPTConfig, {"num_virtual_tokens": 4, **kwargs})
    for model_id, modules_to_save, one_layer in (
        ("FusionStack", ["head"], ["layers.1"]),
        ("grounding_dino", ["text_projection"], r".*layers\.1\.fusion_layer\.attn"),
        ("mm_grounding_dino", ["text_projection"], r".*layers\.1\.fusion_layer\.attn"),
    )
    for label, kwargs in (
        ("defaults", {}),
        ("independent", {"prompt_mode": "independent"}),
        ("hidden from the image, first layer", {"image_attends_prompts": False, "layers_to_transform": 0}),
        ("one layer and modules_to_save", {"target_modules": one_layer, "modules_to_save": modules_to_save}),
    )
]


class CatConfig(SDPTConfig):
    """What the LoRA branch of a test looks at before it compares two active adapters with one that combines them."""

    target_parameters = None


ACTIVE_CASES = [
    (
        "SDPT same",
        "lora",
        CatConfig,
        {"target_modules": ["lin0"], "init_weights": False},
        {"target_modules": ["lin0"], "init_weights": False},
    ),
    (
        "SDPT same, of other sizes",
        "sdpt",
        SDPTConfig,
        {"target_modules": ["lin0", "lin1"], "num_virtual_tokens": 2, "init_weights": False},
        {"target_modules": ["lin0"], "num_virtual_tokens": 5, "prompt_mode": "independent", "init_weights": False},
    ),
    (
        "SDPT different",
        "sdpt",
        SDPTConfig,
        {"target_modules": ["lin0"], "init_weights": False},
        {"target_modules": ["lin1"], "init_weights": False},
    ),
]


def acting(**fields) -> SDPTConfig:
    """A config of adapters that change the outputs at once."""
    return SDPTConfig(init_weights=False, **fields)


MATRICES = {
    "TEST_CASES": CASES,
    "ALL_PEFT_CONFIG_CLASSES": [SDPTConfig],
    "ALL_CONFIG_CLASSES": [(SDPTConfig, {})],
    "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES": ACTIVE_CASES,
    "MIXED_ADAPTER_TEST_CASES": [
        ("SDPT", acting(target_modules=["lin0"]), acting(target_modules=["lin0"], num_virtual_tokens=3)),
        (
            "SDPT, one hidden from the image",
            acting(target_modules=["lin0", "lin1"], image_attends_prompts=False),
            acting(target_modules=["lin0", "lin1"], prompt_mode="independent"),
        ),
    ],
}


# PEFT's toy models, with fusion attentions for layers.


class FusionLinear(GroundingDinoBiMultiHeadAttention):
    """A fusion attention where a toy model has a layer; sizes asked for are ignored."""

    config = host_config("grounding_dino")

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(self.config)
        randomise(self)

    weight = property(lambda self: self.vision_proj.weight)
    bias = property(lambda self: self.vision_proj.bias)


def run_in_turn(self: nn.Module, X: torch.Tensor) -> torch.Tensor:
    """Forward of a toy model: its layers one after the other on tokens made of X."""
    dtype = dtype_of(self)
    image, text = tokens_of(X, dtype, 5, D_MODEL), tokens_of(X, dtype, 4, D_MODEL)
    for layer in _outermost_layers(self):
        (image_delta, _), (text_delta, _) = layer(image, text)
        image, text = image + image_delta, text + text_delta
    return image.mean(1)[:, :2].log_softmax(-1)


def _outermost_layers(module: nn.Module):
    for child in module.children():
        if isinstance(child, (FusionLinear, SDPTLayer, peft.utils.AuxiliaryTrainingWrapper)):
            yield child
        else:
            yield from _outermost_layers(child)


class _AnyModule(type):
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, nn.Module) if cls is ToyModel else super().__instancecheck__(instance)


class ToyModel(nn.Module, metaclass=_AnyModule):
    """In place of `nn.Module`, from which PEFT's toy models derive."""

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        cls.forward = run_in_turn


class FusionNN:
    """In place of `torch.nn`."""

    Module = ToyModel
    Linear = Conv1d = Conv2d = Conv3d = Embedding = FusionLinear

    def __getattr__(self, name: str):
        return getattr(nn, name)


class LoraConfig:
    """In place of `peft.LoraConfig`: an SDPT configuration for the same modules."""

    ignored = frozenset(("r", "lora_alpha", "lora_dropout", "init_lora_weights"))

    def __new__(cls, **kwargs):
        names = {field.name for field in dataclasses.fields(SDPTConfig)}
        names -= cls.ignored
        ours = {name: value for name, value in kwargs.items() if name in names and value != "all-linear"}
        if kwargs.get("init_lora_weights") is False:
            ours["init_weights"] = False
        if kwargs.keys() - names - cls.ignored:
            return peft.LoraConfig(**kwargs)
        # Not LoRA's 8, so that no count of tokens agrees by chance with a size of the host.
        return SDPTConfig(**{"num_virtual_tokens": kwargs.get("r", 5), **ours})


class Parameterized:
    """In place of `parameterized`, where it is not installed; no class that is run uses it."""

    @staticmethod
    def expand(*args, **kwargs):
        return lambda function: function


# Called from within the translated modules.


def adapt_names(module: dict) -> None:
    """Before the first definition of a test module: what its names stand for."""
    module["LoraConfig"] = LoraConfig
    if "nn" in module:
        module["nn"] = FusionNN()
    for name in [name for name in module if name.startswith(("AutoModel", "CLIPTextModel"))]:
        module[name] = auto_model(name)


def adapt_cases(module: dict) -> None:
    """Before each class of a test module: what it is parametrised with."""
    for name, cases in MATRICES.items():
        if name in module:
            module[name] = cases
    if "MockTransformerWrapper" in module:
        module["MockTransformerWrapper"] = Hosts
    if "_skip_if_merging_not_supported" in module:
        module["_skip_if_merging_not_supported"] = lambda *args: pytest.skip(ALL_BUT_MERGING)


def adapt_classes(module: dict) -> None:
    """At the end of a test module."""
    if "TestPeftCustomModel" in module:
        # Common tests that PEFT runs on transformers models alone, or with adapters that change the outputs at once.
        for name in ("disable_adapter", "unload_adapter", "save_pretrained_selected_adapters"):
            setattr(module["TestPeftCustomModel"], f"test_common_{name}", _common_test(f"_test_{name}"))
        name = "add_adapter_no_autocast_adapter_dtype"
        setattr(module["TestPeftCustomModel"], f"test_common_{name}", _common_test(f"_test_{name}", torch.bfloat16))
    if "TestLowCpuMemUsage" in module:
        module["TestLowCpuMemUsage"].inputs = pytest.fixture(lambda self: model_inputs())
    if "TestRequiresGrad" in module:
        check = module["TestRequiresGrad"].check_requires_grad

        # A module trained whole is a fusion attention with twelve parameters, not a linear layer with two.
        def check_requires_grad(self, model: nn.Module, *expected: str) -> None:
            trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
            whole = {name.rpartition(".")[0] for name in expected if "modules_to_save" in name}
            found = {name for name in trained if any(name.startswith(f"{w}.") for w in whole)}
            check(self, model, *found, *(name for name in expected if "modules_to_save" not in name))
            assert all(any(name.startswith(f"{w}.") for name in found) for w in whole)

        module["TestRequiresGrad"].check_requires_grad = check_requires_grad


def _common_test(name: str, *arguments):
    @pytest.mark.parametrize("test_name, model_id, config_cls, config_kwargs", CASES)
    def test(self, test_name, model_id, config_cls, config_kwargs):
        # These tests expect that a new adapter changes the outputs.
        getattr(self, name)(model_id, config_cls, {**config_kwargs, "init_weights": False}, *arguments)

    return test


# The run.


def translate(text: str, substitutions: Iterable[tuple[str, str]]) -> str:
    """Text of a test module, for SDPT."""
    substitutions = list(substitutions)
    for package, stand_ins in STAND_INS.items():
        if find_spec(package) is None:
            substitutions += stand_ins
    for pattern, replacement in substitutions:
        text = re.sub(pattern, replacement, text, flags=re.MULTILINE)
    body = ast.parse(text).body
    definitions = [node for node in body if isinstance(node, (ast.ClassDef, ast.FunctionDef))]
    imports = [n for n in body if isinstance(n, (ast.Import, ast.ImportFrom)) and n.lineno < definitions[0].lineno]
    lines = text.splitlines(keepends=True)
    # From the end, so that the numbers of the lines before hold.
    for node in reversed(definitions):
        if node.name.startswith("Test"):
            start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            lines.insert(start - 1, "peft_suite.adapt_cases(globals())\n")
    lines.insert(imports[-1].end_lineno, "peft_suite.adapt_names(globals())\n")
    lines.insert(imports[0].lineno - 1, "from tests.tools import peft_suite\n")
    return "".join(lines) + "\n\npeft_suite.adapt_classes(globals())\n"


class Report:
    """pytest plugin: leaves out what does not apply, and counts."""

    def __init__(self) -> None:
        self.outcomes: dict[str, Counter] = {}
        self.reasons: Counter = Counter()
        self.skips: Counter = Counter()
        self.failures: Counter = Counter()

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        kept, dropped = [], []
        for item in items:
            reason = self._reason(item)
            (dropped if reason else kept).append(item)
            if reason:
                self.reasons[reason] += 1
                self._count(item.nodeid, "not applicable")
        items[:] = kept
        config.hook.pytest_deselected(items=dropped)

    def _reason(self, item: pytest.Item) -> str | None:
        name = "::".join(item.nodeid.split("::")[1:])
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        for value in parameters:
            kind = value if isinstance(value, type) else type(value)
            if issubclass(kind, peft.PeftConfig) and not issubclass(kind, SDPTConfig):
                return OTHER_TUNER
        return next((why for pattern, why in NOT_APPLICABLE.items() if re.search(pattern, name)), None)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            reason = report.longrepr[-1] if report.skipped else None
            if reason and ALL_BUT_MERGING in reason:
                self._count(report.nodeid, "passed")
                return
            self._count(report.nodeid, report.outcome)
            if reason:
                self.skips[reason.removeprefix("Skipped: ")] += 1
            if report.failed:
                self.failures["::".join(report.nodeid.partition("[")[0].split("::")[1:])] += 1

    def _count(self, nodeid: str, outcome: str) -> None:
        self.outcomes.setdefault(nodeid.split("::")[1], Counter())[outcome] += 1

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        columns = ("passed", "failed", "skipped", "not applicable")
        write = terminalreporter.write_line
        terminalreporter.section("PEFT's tests on SDPT")
        write(f"{'':<34}" + "".join(f"{column:>16}" for column in columns))
        total = Counter()
        for name, counts in self.outcomes.items():
            total += counts
            write(f"{name:<34}" + "".join(f"{counts[column]:>16}" for column in columns))
        write(f"{'all':<34}" + "".join(f"{total[column]:>16}" for column in columns))
        for title, reasons in (("failed", self.failures), ("skipped", self.skips), ("not applicable", self.reasons)):
            write(f"\n{title}:")
            for reason, count in reasons.most_common():
                write(f"{count:>6}  {reason}")


def main(checkout: str, *arguments: str) -> int:
    """Run the tests of a checkout of PEFT, and return pytest's exit status."""
    source = Path(checkout) / "tests"
    version = re.search(r'__version__ = "(.+)"', (Path(checkout) / "src/peft/__init__.py").read_text(encoding="utf-8"))
    if version.group(1) != peft.__version__:
        print(f"These are the tests of PEFT {version.group(1)}, and {peft.__version__} is installed.", file=sys.stderr)
    # Toy models have names that are no repositories.
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    with tempfile.TemporaryDirectory() as folder:
        tests = Path(folder) / "peft_tests"
        tests.mkdir()
        (tests / "__init__.py").touch()
        (Path(folder) / "pytest.ini").write_text("[pytest]\nmarkers =\n    skipf\n    regression\n")
        for name in (*HELPERS, *CLASSES):
            text = (source / name).read_text(encoding="utf-8")
            (tests / name).write_text(translate(text, SUBSTITUTIONS if name in CLASSES else ()), encoding="utf-8")
        targets = [f"{tests / name}::{cls}" for name, classes in CLASSES.items() for cls in classes]
        options = f"-p no:cacheprovider --rootdir {folder} -c {folder}/pytest.ini -q --tb=short -rN".split()
        return pytest.main([*options, *targets, *arguments], plugins=[Report()])


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    torch.set_num_threads(1)
    sys.exit(main(*sys.argv[1:]))
