"""Every family of the installed transformers through both doors, against transformers' eager experts.

A checkpoint is what transformers itself saves, so that its experts have the names and the layout of published
ones. Whole models are compared: logits, the gradient of every parameter that is not an expert's (embeddings
see the gradients of hidden states, routers those of routing weights), and LoRA on the experts.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
import transformers
from tiny_families import tiny_family
from tiny_models import PEFT_WARNINGS, error, tiny_config, tiny_model, tokens
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.qwen3_moe import modeling_qwen3_moe
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import kt_moe
from kt_moe import cli
from kt_moe.computation import bias_names, is_experts, layout_of, parameter_names
from kt_moe.experts import PROJECTIONS
from kt_moe.families import expert_classes, model_class, refused_classes
from kt_moe.hf import KtExperts, KtLoraExperts, KtMoeConfig

pytestmark = [*PEFT_WARNINGS, pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")]

COMPUTED = sorted(expert_classes())
DOCUMENT = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
SCALING = 2.0
NORM = "post_expert_norm"  # of each expert's output
NEW = 4  # tokens that are generated
# Models that do not write a token after the other, or lack something for it.
WRITE_NOTHING = {
    "diffusion_gemma": "writes by diffusion",
    "glm5_next": "the text model has no head",
    "muse_spark": "the text model has no head",
    "openai_privacy_filter": "a token classifier",
    "qwen4_exp": "both layers are linear here, which transformers cannot generate with",
    "qwen3_omni_moe": "the thinker's default config lacks vision_start_token_id",
}
# Relative L2: weights are exact in bf16, what flows between products is rounded.
LOGITS, GRADIENTS = 1e-2, 2e-2


class Family:
    """A tiny checkpoint, and what eager transformers makes of it."""

    def __init__(self, family: str, path: Path) -> None:
        model = tiny_family(family)
        model.save_pretrained(path)
        self.name, self.path, self.model_class = family, path, type(model)
        self.ids = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(1))

    def load(self, **options: Any) -> Any:
        return self.model_class.from_pretrained(self.path, dtype=torch.float32, **options).eval()

    def eager(self) -> Any:
        return self.load(experts_implementation="eager")

    def rounded(self) -> Any:
        return with_bf16_experts(self.load(experts_implementation="batched_mm"))

    def by_config(self) -> Any:
        return self.load(quantization_config=KtMoeConfig())

    def by_implementation(self) -> Any:
        model = self.load(experts_implementation="kt_moe")
        for module in expert_modules(model).values():
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)
        return model

    def run(self, model: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The output, and the gradients of all parameters but experts' weights for a fixed one of it."""
        torch.manual_seed(0)  # of models that start from noise
        out = model(input_ids=self.ids)[0]
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
        out.backward(grad)
        gradients = {
            name: parameter.grad
            for name, parameter in model.named_parameters()
            if parameter.grad is not None and (".experts." not in name or NORM in name)
        }
        return out.detach(), gradients

    def generate(self, model: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Greedily chosen tokens [2, NEW] after the first ones, with a cache, and the logits of each step."""
        torch.manual_seed(0)
        out = model.generate(
            self.ids[:, :6],
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
            use_cache=True,
            return_dict_in_generate=True,
            output_logits=True,
        )
        return out.sequences[:, -NEW:], out.logits


@pytest.fixture(scope="module", params=COMPUTED)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(request.param, tmp_path_factory.mktemp(request.param))


def expert_modules(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if is_experts(module)}


def natural(module: Any) -> dict[str, Tensor]:
    """gate, up [E, I, H] and down [E, H, I] of transformers' module; without gate where it has none."""
    both, down = (getattr(module, name) for name in parameter_names(module))
    both, layout = both[: len(down)], layout_of(module)
    if layout.is_transposed:
        both, down = both.mT, down.mT
    if not layout.has_gate:
        return {"up": both, "down": down}
    gate, up = both.chunk(2, dim=1) if layout.is_concatenated else (both[:, ::2], both[:, 1::2])
    return {"gate": gate, "up": up, "down": down}


def set_weights(module: Any, weights: dict[str, Tensor]) -> None:
    """Put matrices of `natural` into a module, with their autograd history."""
    inner = [weights[p] for p in ("gate", "up") if p in weights]
    layout = layout_of(module)
    both = torch.cat(inner, 1) if layout.is_concatenated else torch.stack(inner, 2).flatten(1, 2)
    for name, weight in zip(parameter_names(module), (both, weights["down"]), strict=True):
        del module._parameters[name]
        setattr(module, name, weight.mT if layout.is_transposed else weight)


def with_bf16_experts(model: Any) -> Any:
    """The model, whose experts compute in bf16: a measure of what rounding alone does."""
    for module in expert_modules(model).values():

        def forward(
            hidden: Tensor, *routing: Tensor, module: Any = module, inner: Any = module.forward
        ) -> Tensor:
            names = [*parameter_names(module), *(bias_names(module) if layout_of(module).has_bias else ())]
            kept = {name: getattr(module, name) for name in names}
            for name, weight in kept.items():
                module._parameters.pop(name, None)
                setattr(module, name, weight.bfloat16())
            of_routing = [one.bfloat16() if one.is_floating_point() else one for one in routing]
            out = inner(hidden.bfloat16(), *of_routing).to(hidden.dtype)
            for name, weight in kept.items():
                setattr(module, name, weight)
            return out

        module.forward = forward
    return model


def check_gradients(
    ours: dict[str, Tensor], reference: dict[str, Tensor], rounded: Callable[[], dict[str, Tensor]]
) -> None:
    """Errors are small, or where a model amplifies rounding, at most three times those of experts in bf16."""
    assert ours.keys() == reference.keys()
    largest = max(float(g.norm()) for g in reference.values())
    # of smaller ones the sums cancel, and rounding is all there is
    errors = {n: error(ours[n], g) for n, g in reference.items() if float(g.norm()) > 1e-4 * largest}
    large = {name: value for name, value in errors.items() if value > GRADIENTS}
    if large:
        theirs = rounded()
        for name, value in large.items():
            assert value < 3 * error(theirs[name], reference[name]), name


@pytest.mark.timeout(120)
def test_logits_and_gradients(family: Family) -> None:
    wanted, gradients = family.run(family.eager())
    outputs = []
    for model in (family.by_config(), family.by_implementation()):
        out, found = family.run(model)
        assert error(out, wanted) < LOGITS
        check_gradients(found, gradients, lambda: family.run(family.rounded())[1])
        outputs.append(out)
    assert torch.equal(*outputs)


def test_generate(family: Family) -> None:
    reference = family.eager()
    if family.name in WRITE_NOTHING:
        pytest.skip(WRITE_NOTHING[family.name])
    wanted, reference_logits = family.generate(reference)
    for model in (family.by_config(), family.by_implementation()):
        found, logits = family.generate(model)
        same = torch.ones(len(found), dtype=torch.bool)  # rows that have had the same tokens so far
        for step, (ours, theirs) in enumerate(zip(logits, reference_logits, strict=True)):
            for row in same.nonzero().flatten():
                assert error(ours[row], theirs[row]) < 2 * LOGITS
                first, second = theirs[row].topk(2).values
                close = first - second < 2 * (ours[row] - theirs[row]).abs().max()
                same[row] = found[row, step] == wanted[row, step]
                assert same[row] or close


def test_a_loaded_model_is_taken_over(family: Family) -> None:
    out, found = family.run(kt_moe.wrap(family.eager()))
    expected, gradients = family.run(family.by_config())
    assert torch.equal(out, expected)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():  # torch's own may differ in their last bits, as Jamba's do
        assert float((found[name] - gradient).norm()) <= 1e-5 * float(gradient.norm()), name


def test_weights_are_those_of_the_checkpoint(family: Family) -> None:
    theirs = expert_modules(family.eager())
    ours = {name: m for name, m in family.by_config().named_modules() if isinstance(m, KtExperts)}
    assert ours.keys() == theirs.keys()
    for name, module in ours.items():
        found = {p: w for p, w in zip(PROJECTIONS, module.experts.dequantize(), strict=True) if w is not None}
        wanted = natural(theirs[name])
        assert found.keys() == wanted.keys()
        for projection, weight in found.items():
            assert torch.equal(weight.float(), wanted[projection]), (name, projection)


def merge_lora(
    modules: dict[str, Any], layers: dict[str, KtLoraExperts]
) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
    """Make the weights of transformers' modules W + s B A; the leaves A and B, by path and projection."""
    pairs = {}
    for name, module in modules.items():
        weights = {}
        for projection, weight in natural(module).items():
            a, b = (
                getattr(layers[name], matrix)["default"][projection].detach().clone().requires_grad_()
                for matrix in ("lora_A", "lora_B")
            )
            pairs[name, projection] = a, b
            weights[projection] = weight + SCALING * b @ a
        set_weights(module, weights)
    return pairs


def lora_gradients(pairs: dict[tuple[str, str], tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    return {
        f"{name}.{projection}.{matrix}": leaf.grad
        for (name, projection), leaves in pairs.items()
        for matrix, leaf in zip(("lora_A", "lora_B"), leaves, strict=True)
        if leaf.grad is not None
    }


def test_lora(family: Family) -> None:
    torch.manual_seed(3)
    config = peft.LoraConfig(r=2, lora_alpha=2 * SCALING, target_modules=["experts"], init_lora_weights=False)
    ours = peft.inject_adapter_in_model(config, family.by_config()).requires_grad_(True)
    layers = {name: m for name, m in ours.named_modules() if isinstance(m, KtLoraExperts)}
    reference = family.eager()
    modules = expert_modules(reference)
    assert layers.keys() == modules.keys()
    pairs = merge_lora(modules, layers)
    wanted, gradients = family.run(reference)
    out, found = family.run(ours)
    assert error(out, wanted) < LOGITS

    def rounded() -> dict[str, Tensor]:
        model = family.rounded()
        copies = merge_lora(expert_modules(model), layers)
        _, gradients = family.run(model)
        return gradients | lora_gradients(copies)

    of_lora = lora_gradients(pairs)
    assert of_lora  # a list of experts may get no tokens, not all
    for name, layer in layers.items():
        for matrix in ("lora_A", "lora_B"):
            for projection, parameter in getattr(layer, matrix)["default"].items():
                key = f"{name}.{projection}.{matrix}"
                if key in of_lora:
                    found[key] = parameter.grad
    found = {name.replace(".base_layer", ""): g for name, g in found.items() if ".default." not in name}
    check_gradients(found, gradients | of_lora, rounded)


# By family an option with which its experts compute something else, and what the core lacks then.
OTHERWISE = {
    "qwen3_moe": ("hidden_act", "relu", "the activation ReLU"),
    "nemotron_h": ("mlp_hidden_act", "relu", "the activation ReLU"),
    "muse_spark": ("hidden_act", "tanh", "the activation Tanh"),
    "glm5_next": ("swiglu_limit", 9.0, "the activation silu with gate and up clamped to 9"),
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_refused_by_name_before_anything_is_read(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = Family(name, tmp_path)
    option, value, lacks = OTHERWISE[name]
    config = json.loads((tmp_path / "config.json").read_text())
    assert config[option] != value
    (tmp_path / "config.json").write_text(json.dumps(config | {option: value}))
    monkeypatch.setattr(kt_moe.hf.quantizer, "Checkpoint", None)
    monkeypatch.setattr(saved.model_class, "_load_pretrained_model", None)
    message = f"'{name}.*it lacks {lacks}"
    for options in ({"quantization_config": KtMoeConfig()}, {"experts_implementation": "kt_moe"}):
        with pytest.raises(ValueError, match=message):
            saved.load(**options)


UNKNOWN = {"jetmoe": "JetMoeParallelExperts", "step3p7": "Step3p7Experts"}


@pytest.mark.parametrize("model_type", UNKNOWN)
def test_experts_without_transformers_mark_are_refused_by_name(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CONFIG_MAPPING[model_type]()
    config.save_pretrained(tmp_path)
    safetensors.torch.save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors", {"format": "pt"})
    monkeypatch.setattr(kt_moe.hf.quantizer, "Checkpoint", None)  # nothing is read
    made = model_class(config)
    monkeypatch.setattr(made, "_load_pretrained_model", None)
    message = rf"is not supported by kt_moe: .* {UNKNOWN[model_type]}, which lacks"
    for options in ({"quantization_config": KtMoeConfig()}, {"experts_implementation": "kt_moe"}):
        with pytest.raises(ValueError, match=message):
            made.from_pretrained(tmp_path, **options)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=message):
        kt_moe.load_model(tmp_path)


def test_refused_before_weights_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By config.json alone; a model that is not refused goes on to fetch them."""

    class FetchedError(Exception):
        pass

    def fetch(*args: Any, **kwargs: Any) -> None:
        raise FetchedError("weights")

    monkeypatch.setattr(transformers.modeling_utils, "_get_resolved_checkpoint_files", fetch)
    options: dict[str, Any]
    for options, raised, message in (
        ({"hidden_act": "relu"}, ValueError, "'qwen3_moe' .*it lacks the activation ReLU"),
        ({"num_experts": 4, "mlp_only_layers": [0, 1]}, ValueError, "this config has no layer with routed"),
        ({}, FetchedError, "weights"),
    ):
        transformers.Qwen3MoeConfig(num_hidden_layers=2, **options).save_pretrained(tmp_path)
        with pytest.raises(raised, match=message):
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=KtMoeConfig())


class NewConfig(transformers.Qwen3MoeConfig):  # type: ignore[misc]
    model_type = "brand_new"


class NewModel(transformers.Qwen3MoeForCausalLM):  # type: ignore[misc]
    config_class = NewConfig


def test_a_family_that_nobody_knows_works_if_it_computes_what_we_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save() -> Any:
        model = NewModel(NewConfig(**tiny_config().to_diff_dict() | {"model_type": "brand_new"})).eval()
        model.save_pretrained(tmp_path)
        return model

    model = save()
    names = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert "model.layers.0.mlp.experts.gate_up_proj" in names  # no conversions for this name
    with torch.no_grad():
        wanted = model(tokens()).logits
        for options in ({"quantization_config": KtMoeConfig()}, {"experts_implementation": "kt_moe"}):
            ours = NewModel.from_pretrained(tmp_path, **options).requires_grad_(False)
            assert error(ours(tokens()).logits, wanted) < LOGITS

    def other_way_round(self: Any, both: Tensor) -> Tensor:
        gate, up = both.chunk(2, dim=-1)
        return gate * self.act_fn(up)

    monkeypatch.setattr(type(model.model.layers[0].mlp.experts), "_apply_gate", other_way_round)
    for options in ({"quantization_config": KtMoeConfig()}, {"experts_implementation": "kt_moe"}):
        with pytest.raises(ValueError, match=r"'brand_new' \(Qwen3MoeExperts\): it lacks the activation"):
            NewModel.from_pretrained(tmp_path, **options)


class OwnForward(Qwen3MoeExperts):  # type: ignore[misc]
    """Experts of a family that works, whose output somebody halves."""

    def forward(self, *args: Any) -> Tensor:
        return super().forward(*args) / 2


def test_a_subclass_with_a_forward_of_its_own_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(modeling_qwen3_moe, "Qwen3MoeExperts", OwnForward)
    message = r"'qwen3_moe' \(OwnForward\): it lacks what OwnForward.forward computes"
    for options in ({"quantization_config": KtMoeConfig()}, {"experts_implementation": "kt_moe"}):
        with pytest.raises(ValueError, match=message):
            type(model).from_pretrained(tmp_path, **options)
    with pytest.raises(ValueError, match=message):
        kt_moe.wrap(type(model).from_pretrained(tmp_path))


def test_clamps_are_at_work(family: Family) -> None:
    wanted, _ = family.run(family.eager())
    model = family.eager()
    modules = expert_modules(model).values()
    limited = [m for m in modules if hasattr(m, "limit")]
    softcaps = [m for module in modules for m in module.modules() if hasattr(m, "softcap")]
    if not limited and not softcaps:
        pytest.skip("experts without limits")
    for module in limited:
        module.limit = module.swiglu_limit = 1e9
    for module in softcaps:
        module.softcap = 1e9
    out, _ = family.run(model)
    assert error(out, wanted) > LOGITS


def test_one_expert_wrong_is_seen(family: Family) -> None:
    # The comparison itself: with another expert's weights in one place the error is far beyond the tolerance.
    wanted, _ = family.run(family.eager())
    model = family.by_implementation()
    family.run(model)
    name, experts = next(iter(kt_moe.model_experts(model).items()))
    module, wrong = model.get_submodule(name), int(experts.routed.argmax())
    with torch.no_grad():
        module.down_proj[wrong] = module.down_proj[wrong - 1]
    out, _ = family.run(model)
    assert error(out, wanted) > 3 * LOGITS


def test_the_command_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models"]) == 0
    *lines, _, summary = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines[1:]]
    assert [name for name, works, *_ in rows if works == "yes"] == COMPUTED
    refused = [line for line, (_, works, *_) in zip(lines[1:], rows, strict=True) if works == "no"]
    assert [line.split()[0] for line in refused] == sorted(refused_classes())
    assert all("transformers does not let others compute" in line for line in refused)
    assert summary.endswith(f"{len(COMPUTED)} of {len(COMPUTED) + len(refused)} families work")
    if summary in DOCUMENT:  # it is of the installed version
        assert "\n".join([*lines, "", summary]) in DOCUMENT


def test_the_command_shows_named_families(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models", "mixtral", "granitemoe"]) == 0
    first, second = capsys.readouterr().out.splitlines()[1:3]
    assert first.split()[-1] == "model.layers.N.block_sparse_moe.{input_linear.weight,output_linear.weight}"
    assert second.split() == [
        "mixtral",
        "yes",
        "silu",
        "mlp.gate",
        "model.layers.N.block_sparse_moe.experts.E.{w1,w3,w2}",
    ]
    assert cli.main(["models", "gpt_oss", "afmoe"]) == 0
    assert [line.split()[3] for line in capsys.readouterr().out.splitlines()[1:3]] == [
        "mlp.router.gate",
        "mlp.router",
    ]
    assert cli.main(["models", "jetmoe", "dbrx", "step3p7"]) == 0
    found = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()[1:4]]
    assert [name for name, *_ in found] == ["dbrx", "jetmoe", "step3p7"]
    assert {works for _, works, _ in found} == {"no"}
    assert found[0][2].strip() == "transformers does not let others compute DbrxExperts"
    assert cli.main(["models", "llama"]) == 2
    assert "has no experts in llama" in capsys.readouterr().err
