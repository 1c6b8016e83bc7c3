"""LoRA on kt_moe experts through unmodified PEFT, Trainer and SFTTrainer, against plain PEFT."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model
from tiny_models import (
    ALL_EXPERTS,
    PEFT_WARNINGS,
    error,
    gradients,
    load,
    lora_layers,
    plain_peft,
    save_tiny_checkpoint,
    tokens,
    with_lora,
)
from torch import Tensor

import kt_moe
from kt_moe.experts import PROJECTIONS
from kt_moe.hf import KtExperts, KtLoraExperts, KtMoeConfig

pytestmark = PEFT_WARNINGS

TARGETS = (["experts"], ["q_proj", "v_proj", "experts"], "all-linear", ["down_proj"])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("qwen3"), **ALL_EXPERTS)


def test_peft_has_what_we_hook_into() -> None:
    """The private parts of PEFT that kt_moe.hf.tuner overrides or relies on."""
    tuner = peft.tuners.lora.LoraModel
    for name in (
        "inject_adapter", "_prepare_adapter_config", "_check_new_adapter_config", "_create_new_module",
        "_replace_module", "_check_merge_allowed", "_get_adapter_state_dict", "add_weighted_adapter",
        "_remap_adapter_state_dict_for_load", "_generalized_task_arithmetic_weighted_adapter",
    ):  # fmt: skip
        assert callable(getattr(tuner, name)), name
    assert issubclass(peft.PEFT_TYPE_TO_TUNER_MAPPING[peft.PeftType.LORA], tuner)


def test_models_without_our_experts_are_left_to_peft(checkpoint: Path) -> None:
    model = get_peft_model(load(checkpoint, kt=False), LoraConfig(target_modules=["q_proj"]))
    assert model.peft_config["default"].target_modules == {"q_proj"}
    assert not lora_layers(model)


@pytest.mark.parametrize("targets", TARGETS, ids=str)
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}], ids=["", "rslora"])
def test_saved_adapter_in_plain_peft(
    targets: Any, options: dict[str, Any], checkpoint: Path, tmp_path: Path
) -> None:
    ours = with_lora(checkpoint, targets, **options).eval()
    ours.save_pretrained(tmp_path)
    logits = ours(tokens()).logits
    reference = plain_peft(checkpoint, tmp_path).eval()(tokens()).logits
    in_bf16 = plain_peft(checkpoint, tmp_path, torch.bfloat16).eval()(tokens()).logits
    assert error(logits, reference) <= error(in_bf16, reference) < 0.05
    assert error(load(checkpoint)(tokens()).logits, reference) > 0.1

    again = PeftModel.from_pretrained(load(checkpoint), tmp_path)
    assert torch.equal(again(tokens()).logits, logits)
    assert {p.requires_grad for p in again.parameters()} == {False}


def test_gradients_are_those_of_plain_peft(checkpoint: Path, tmp_path: Path) -> None:
    """LoRA gradients through the whole model, no further from float32 than those of a bf16 model."""
    ours = with_lora(checkpoint, ["q_proj", "experts"])
    ours.save_pretrained(tmp_path)
    models = (ours, plain_peft(checkpoint, tmp_path), plain_peft(checkpoint, tmp_path, torch.bfloat16))
    for model in models:
        model(tokens(4, 24), labels=tokens(4, 24)).loss.backward()
    mine = {name.replace(".default", ""): g for name, g in gradients(ours).items()}
    reference, in_bf16 = (unfused(gradients(model), mine) for model in models[1:])
    assert len(mine) == 2 * (2 + 6)
    for name, gradient in mine.items():
        assert error(gradient, reference[name]) <= error(in_bf16[name], reference[name]), name


def unfused(theirs: dict[str, Tensor], names: Any) -> dict[str, Tensor]:
    """Plain PEFT's gradients under our names; see `kt_moe.hf.portable` for the layout."""
    e, r, i = 4, 4, 24
    found = {name.replace(".default", ""): g for name, g in theirs.items()}
    for path in {name.partition(".lora_")[0] for name in names if ".experts." in name}:
        a = found[f"{path}.base_layer.lora_A.weight"].view(e, 2 * r, -1)
        b = found[f"{path}.base_layer.lora_B.weight"].view(2 * i, 2 * r, e).permute(2, 0, 1)
        found |= {f"{path}.lora_A.gate": a[:, :r], f"{path}.lora_A.up": a[:, r:]}
        found |= {f"{path}.lora_B.gate": b[:, :i, :r], f"{path}.lora_B.up": b[:, i:, r:]}
        found[f"{path}.lora_A.down"] = found[f"{path}.lora_A.weight"].view(e, r, -1)
        found[f"{path}.lora_B.down"] = found[f"{path}.lora_B.weight"].view(-1, r, e).permute(2, 0, 1)
    return found


def test_ordinarily_loaded_model(checkpoint: Path, tmp_path: Path) -> None:
    base = load(checkpoint, kt=False, experts_implementation="kt_moe")
    ours = with_lora(checkpoint, ["q_proj", "experts"], base=base).eval()
    logits = ours(tokens()).logits
    logits.square().mean().backward()
    assert all(g is not None for g in gradients(ours).values())
    assert len(lora_layers(ours)) == 2
    ours.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(load(checkpoint), tmp_path)(tokens()).logits, logits)


@pytest.mark.parametrize(
    ("targets", "projections"),
    [
        (["experts"], ("gate", "up", "down")),
        (["mlp.experts"], ("gate", "up", "down")),
        (r".*\.(q_proj|experts)", ("gate", "up", "down")),
        (["gate_proj", "up_proj", "down_proj"], ("gate", "up", "down")),
        (["gate_proj", "up_proj"], ("gate", "up")),
        (["down_proj"], ("down",)),
    ],
    ids=str,
)
def test_targets(targets: Any, projections: tuple[str, ...], checkpoint: Path) -> None:
    model = with_lora(checkpoint, targets)
    assert len(lora_layers(model)) == 2
    for layer in lora_layers(model):
        assert tuple(layer.lora_A["default"]) == projections


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["experts", "shared_experts.up_proj"], r"targets \['shared_experts.up_proj'\], which match nothing"),
        (["q_proj", "qproj"], r"targets \['qproj'\].*it has .*'experts.gate_proj'.* 'gate', .*'q_proj'"),
        (r".*\.nothing", r"targets \['.*nothing'\], which match nothing"),
        ("gate_proj", r"A string is a pattern for whole names: .* target_modules=\['gate_proj'\]"),
    ],
    ids=str,
)
def test_a_target_without_match(targets: Any, message: str, checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=message):
        with_lora(checkpoint, targets)


SOME = r'names {} of the 4 experts at model.layers.0.mlp.experts \(.*write "experts.gate_proj"'


@pytest.mark.parametrize(
    ("targets", "options", "message"),
    [
        (["experts.0.gate_proj"], {}, f"target_modules: .*{SOME.format(1)}"),
        (["q_proj", "experts.3.gate_proj"], {}, f"target_modules: .*{SOME.format(1)}"),
        (r".*\.experts\.[0-2]\.gate_proj", {}, f"target_modules: .*{SOME.format(3)}"),
        (["experts"], {"exclude_modules": ["3.gate_proj"]}, f"exclude_modules: .*{SOME.format(1)}"),
        (["experts"], {"exclude_modules": r".*\.0\.gate_proj"}, f"exclude_modules: .*{SOME.format(1)}"),
        (["experts"], {"rank_pattern": {"experts.2.gate_proj": 2}}, f"rank_pattern: .*{SOME.format(1)}"),
        (["experts"], {"alpha_pattern": {r"0\.gate_proj": 2}}, f"alpha_pattern: .*{SOME.format(1)}"),
    ],
    ids=str,
)
def test_some_experts_of_a_layer_are_no_target(
    targets: Any, options: dict[str, Any], message: str, checkpoint: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        with_lora(checkpoint, targets, **options)


def test_a_pattern_of_all_numbers_is_that_of_all_experts(checkpoint: Path) -> None:
    for layer in lora_layers(with_lora(checkpoint, r".*\.experts\.\d+\.(gate|down)_proj")):
        assert layer.lora_A["default"].keys() == {"gate", "down"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"layers_to_transform": [1, 7]},
            r"layers_to_transform has \[7\], the layers of this model are 0 to 1",
        ),
        (
            {"modules_to_save": ["experts"]},
            "'experts', and model.layers.0.mlp.experts has routed experts, which",
        ),
        ({"modules_to_save": ["mlp"]}, "'mlp', and model.layers.0.mlp has routed experts, which are frozen"),
        ({"modules_to_save": "lm_head"}, "LoraConfig has modules_to_save 'lm_head', wanted a list of names"),
        ({"r": 2.5}, "LoraConfig has rank 2.5, wanted an integer of at least 1"),
        ({"rank_pattern": {"experts": "x"}}, "LoraConfig has rank 'x' for 'experts', wanted an integer"),
        ({"rank_pattern": {"q_proj": 0}}, "LoraConfig has rank 0 for 'q_proj', wanted an integer"),
        ({"rank_pattern": {3: 4}}, r"LoraConfig has rank_pattern \{3: 4\}, wanted an object"),
        ({"lora_alpha": float("nan")}, "LoraConfig has lora_alpha nan, wanted a finite number"),
        ({"alpha_pattern": {"q_proj": "x"}}, "LoraConfig has lora_alpha 'x' for 'q_proj', wanted a finite"),
        ({"lora_dropout": 2.0}, "LoraConfig has lora_dropout 2.0, wanted a probability"),
        ({"exclude_modules": [3]}, r"LoraConfig has exclude_modules \{3\}, wanted names"),
        ({"init_lora_weights": 1}, "init_lora_weights=1 does not work on kt_moe experts: it is not known"),
        ({"layer_replication": [(0, 2), (0, 2)]}, "layer_replication does not work with kt_moe experts"),
        ({"use_dora": True}, r"use_dora does not work on kt_moe experts: it scales every row of W \+ s B A"),
    ],
    ids=str,
)
def test_what_is_refused_leaves_the_model_as_it_was(
    options: dict[str, Any], message: str, checkpoint: Path
) -> None:
    model = with_lora(checkpoint, ["q_proj"])
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=message):
        model.add_adapter("more", LoraConfig(target_modules=["q_proj", "v_proj", "experts"], **options))
    assert [name for name, _ in model.named_modules()] == before
    assert list(model.peft_config) == model.active_adapters == ["default"]


@pytest.mark.parametrize("where", ["update_layer", "saved_config"])
def test_an_interrupt_leaves_no_half_of_an_adapter(
    where: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_lora(checkpoint, ["q_proj", "experts"])
    before = [name for name, _ in model.named_modules()]

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    owner = "lora.KtLoraExperts" if where == "update_layer" else "tuner"
    monkeypatch.setattr(f"kt_moe.hf.{owner}.{where}", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.add_adapter("more", LoraConfig(target_modules=["q_proj", "v_proj", "experts"]))
    assert [name for name, _ in model.named_modules()] == before
    assert list(model.peft_config) == model.active_adapters == ["default"]


def test_a_pattern_without_match(checkpoint: Path) -> None:
    with pytest.warns(RuntimeWarning, match=r"alpha_pattern has \['xproj'\], which match nothing"):
        with_lora(
            checkpoint, ["experts", "q_proj"], alpha_pattern={"xproj": 1, "experts.up_proj": 2, "q_proj": 3}
        )


def test_one_meaning_of_a_name(tmp_path: Path) -> None:
    """gate_proj and so on are those of routed experts, shared experts and dense layers, in every family."""
    for family in ("deepseek_v3", "qwen2_moe", "glm4_moe"):
        save_tiny_checkpoint(tmp_path / family, family)
        for targets, routed, others in (
            (["down_proj"], True, True),
            (["experts.down_proj"], True, False),
            (["experts"], True, False),
            (["shared_expert.down_proj", "shared_experts.down_proj"], False, True),
        ):
            names = [
                t
                for t in targets
                if not t.startswith("shared") or ("expert." in t) == (family == "qwen2_moe")
            ]
            model = with_lora(tmp_path / family, names)
            assert bool(lora_layers(model)) == routed, (family, targets)
            linear = [n for n, m in model.named_modules() if isinstance(m, peft.tuners.lora.Linear)]
            assert any(n.endswith("down_proj") and "shared" in n for n in linear) == others
            assert any(n.endswith("layers.0.mlp.down_proj") for n in linear) == (
                targets == ["down_proj"] and family != "qwen2_moe"
            )


def test_the_callers_config_is_not_changed(checkpoint: Path) -> None:
    for targets in (["experts", "q_proj"], "all-linear"):
        config = LoraConfig(
            target_modules=targets, rank_pattern={"experts": 3}, use_rslora=True, lora_dropout=0.1
        )
        before = copy.deepcopy(config.to_dict())
        model = get_peft_model(load(checkpoint), config)
        after = config.to_dict()
        assert type(config) is LoraConfig
        assert {**after, "base_model_name_or_path": None} == before  # which PEFT itself sets
        assert model.peft_config["default"].target_modules == config.target_modules


def test_other_models_have_pefts_own_tuner(checkpoint: Path) -> None:
    plain = get_peft_model(load(checkpoint, kt=False), LoraConfig(target_modules=["q_proj"]))
    assert type(plain.base_model) is peft.tuners.lora.LoraModel
    assert type(plain.peft_config["default"]) is LoraConfig
    copy.deepcopy(with_lora(checkpoint))


def test_some_layers_only(checkpoint: Path) -> None:
    model = with_lora(checkpoint, layers_to_transform=[1])
    assert isinstance(model.model.model.layers[0].mlp.experts, KtExperts)
    assert isinstance(model.model.model.layers[1].mlp.experts, KtLoraExperts)


def test_initial_values(checkpoint: Path) -> None:
    bound = 32**-0.5
    for init, b_is_zero in ((True, True), ("gaussian", True), (False, False)):
        layer = lora_layers(with_lora(checkpoint, init_lora_weights=init))[0]
        a, b = layer.lora_A["default"]["gate"], layer.lora_B["default"]["gate"]
        assert (a.shape, b.shape) == ((4, 4, 32), (4, 24, 4))
        assert a.dtype is b.dtype is torch.float32
        assert (not b.any()) is b_is_zero
        assert abs(float(a.detach().std()) / (0.25 if init == "gaussian" else bound / 3**0.5) - 1) < 0.15


def test_orthogonal_initial_values(checkpoint: Path) -> None:
    """Neither matrix is zero, their product is: the model computes at first what it did."""
    options = {"init_lora_weights": "orthogonal", "r": 4, "rank_pattern": {"experts.down_proj": 6}}
    model = with_lora(checkpoint, ["q_proj", "experts"], **options)
    for layer in lora_layers(model):
        for projection, a in layer.lora_A["default"].items():
            b = layer.lora_B["default"][projection]
            assert min(float(x.detach().std()) for x in (a, b)) > 0.05
            assert float((b @ a).detach().abs().max()) < 1e-6
            assert not torch.equal(a[0], a[1])
    assert error(model(tokens()).logits, load(checkpoint)(tokens()).logits) < 1e-2
    with pytest.raises(ValueError, match="'orthogonal' needs even ranks, down_proj has 3"):
        with_lora(checkpoint, init_lora_weights="orthogonal", rank_pattern={"experts.down_proj": 3})


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])  # gpt-oss has biases
def test_parameters_are_counted_as_those_of_the_plain_model(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_tiny_checkpoint(tmp_path, family)
    model = with_lora(base, ["q_proj", "experts"])
    plain = sum(p.numel() for p in load(base, kt=False).parameters())
    lora = sum(p.numel() for p in model.parameters() if p.requires_grad)
    for one in (model, copy.deepcopy(model)):
        assert one.get_nb_trainable_parameters() == (lora, plain + lora)
    model.print_trainable_parameters()
    assert f"trainable params: {lora:,d} || all params: {plain + lora:,d} ||" in capsys.readouterr().out
    model.set_requires_grad("default", False)
    assert model.get_nb_trainable_parameters() == (0, plain + lora)
    # experts that stay torch's parameters are counted by PEFT itself
    theirs = load(base, kt=False, experts_implementation="kt_moe").requires_grad_(False)
    assert with_lora(base, base=theirs).get_nb_trainable_parameters()[1] > plain


def test_only_lora_is_trainable(checkpoint: Path) -> None:
    model = with_lora(checkpoint, ["q_proj", "experts"], modules_to_save=["lm_head"])
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(names) == 2 * (2 + 6) + 1
    assert all("lora_" in name or "lm_head.modules_to_save" in name for name in names)


def test_dropout(checkpoint: Path) -> None:
    # The layer is linear in what the down projection drops: the mean over masks is the layer without.
    model = with_lora(checkpoint, ["down_proj"], lora_dropout=0.5)
    layer = lora_layers(model)[0]
    x, ids, weights = torch.randn(6, 32), torch.tensor([[0, 1]] * 6), torch.rand(6, 2)

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return layer(x, ids, weights).detach()

    model.eval()
    evaluated = run(0)
    assert torch.equal(run(1), evaluated)
    model.train()
    assert torch.equal(run(0), run(0))
    assert error(run(1), run(0)) > 1e-2
    mean = torch.stack([run(seed) for seed in range(100)]).mean(dim=0)
    assert error(mean, evaluated) < 0.2 * error(run(0), evaluated)


# Adapter bookkeeping, as for any PEFT layer


def test_several_adapters(checkpoint: Path) -> None:
    model = with_lora(checkpoint).eval()
    alone = load(checkpoint)(tokens()).logits
    first = model(tokens()).logits
    with model.disable_adapter():
        assert torch.equal(model(tokens()).logits, alone)

    torch.manual_seed(1)
    options = {"target_modules": ["down_proj"], "r": 3, "lora_alpha": 9, "init_lora_weights": False}
    model.add_adapter("second", LoraConfig(**options))
    assert torch.equal(model(tokens()).logits, first)
    assert not any(p.requires_grad for name, p in model.named_parameters() if "second" in name)
    model.set_adapter("second")
    second = model(tokens()).logits
    assert error(second, first) > 1e-2
    assert all(p.requires_grad == ("second" in n) for n, p in model.named_parameters() if "lora_" in n)

    # One expert block is linear in the sum of the two only up to its activation: check against eager weights.
    model.base_model.set_adapter(["default", "second"])
    layer = lora_layers(model)[0]
    x, ids, weights = torch.randn(5, 32), torch.tensor([[0, 1]] * 5), torch.rand(5, 2)
    both = layer(x, ids, weights)
    assert error(both, summed(layer, ("default", "second"), x, ids, weights)) < 1e-2

    model.base_model.set_adapter("default")
    model.delete_adapter("second")
    assert torch.equal(model(tokens()).logits, first)
    assert not any("second" in name for name, _ in model.named_parameters())


def summed(
    layer: KtLoraExperts, adapters: tuple[str, ...], x: Tensor, ids: Tensor, weights: Tensor
) -> Tensor:
    """The layer by the book, with W + sum of s B A."""
    matrices = dict(zip(PROJECTIONS, (w.float() for w in layer.base_layer.experts.dequantize()), strict=True))
    for name, p in itertools.product(adapters, PROJECTIONS):
        if p in layer.lora_A[name]:
            matrices[p] = matrices[p] + layer.scaling[name] * layer.lora_B[name][p] @ layer.lora_A[name][p]
    out = torch.zeros_like(x)
    for t, k in itertools.product(range(ids.shape[0]), range(ids.shape[1])):
        gate, up, down = (matrices[p][ids[t, k]] for p in PROJECTIONS)
        out[t] += weights[t, k] * (down @ (torch.nn.functional.silu(gate @ x[t]) * (up @ x[t])))
    return out


def test_different_dropouts_cannot_be_active_together(checkpoint: Path) -> None:
    model = with_lora(checkpoint)
    model.add_adapter("second", LoraConfig(target_modules=["experts"], lora_dropout=0.1))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=r"different lora_dropout \[0.0, 0.1\]"):
        model.train()(tokens())


def test_further_adapter_from_disk(checkpoint: Path, tmp_path: Path) -> None:
    other = with_lora(checkpoint, ["q_proj", "experts"], seed=1).eval()
    other.save_pretrained(tmp_path)
    model = with_lora(checkpoint).eval()
    result = model.load_adapter(tmp_path, "other", low_cpu_mem_usage=True)
    assert not result.missing_keys
    assert not result.unexpected_keys
    model.set_adapter("other")
    assert torch.equal(model(tokens()).logits, other(tokens()).logits)


def test_unload_and_merge(checkpoint: Path) -> None:
    model = with_lora(checkpoint, ["q_proj", "experts"])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for merge in (model.merge_and_unload, model.merge_adapter, lora_layers(model)[0].merge):
        with pytest.raises(NotImplementedError, match=r"kt_moe\.merge_checkpoint\(base_dir"):
            merge()
    assert all(
        torch.equal(p, before[name]) for name, p in model.named_parameters()
    )  # q_proj not merged either
    base = model.unload()
    assert torch.equal(base(tokens()).logits, load(checkpoint)(tokens()).logits)


def test_transformers_own_add_adapter(checkpoint: Path, tmp_path: Path) -> None:
    model = load(checkpoint)
    model.add_adapter(LoraConfig(target_modules=["experts"], init_lora_weights=False))
    assert len(lora_layers(model)) == 2
    adapted = model(tokens()).logits
    model.disable_adapters()
    assert torch.equal(model(tokens()).logits, load(checkpoint)(tokens()).logits)
    model.enable_adapters()
    assert torch.equal(model(tokens()).logits, adapted)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(load(checkpoint), tmp_path)(tokens()).logits, adapted)


def test_ways_to_load_an_adapter(checkpoint: Path, tmp_path: Path) -> None:
    model = with_lora(checkpoint).eval()
    model.save_pretrained(tmp_path)
    options = {"quantization_config": KtMoeConfig(), "dtype": torch.float32}
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path, **options)
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)
    prepared = peft.prepare_model_for_kbit_training(load(checkpoint))
    again = PeftModel.from_pretrained(prepared, tmp_path)
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)
    with pytest.raises(NotImplementedError, match=r"use peft\.PeftModel\.from_pretrained"):
        load(checkpoint).load_adapter(tmp_path)
    with pytest.raises(NotImplementedError, match=r"use peft\.PeftModel\.from_pretrained"):
        load(tmp_path)


def test_deepcopy(checkpoint: Path) -> None:
    model = with_lora(checkpoint).eval()
    twin = copy.deepcopy(model)
    lora_layers(model)[0].lora_B["default"]["down"].data.zero_()
    assert error(twin(tokens()).logits, model(tokens()).logits) > 1e-3


@pytest.mark.filterwarnings("ignore:lora with eva initialization used with low_cpu_mem_usage=False")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "use_dora does not work on kt_moe experts"),
        ({"lora_bias": True}, "lora_bias does not work on kt_moe experts"),
        ({"init_lora_weights": "pissa_niter_x"}, "does not work on kt_moe experts: it is not known"),
        ({"init_lora_weights": "pissa_niter_99999999999"}, "N below 1000"),
        ({"init_lora_weights": "eva", "eva_config": EvaConfig()}, "not work on kt_moe experts: it looks at"),
        ({"rank_pattern": {"experts": 0}}, "LoraConfig has rank 0 for 'experts', wanted an integer"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_options_that_do_not_work(options: dict[str, Any], message: str, checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=message):
        with_lora(checkpoint, **options)


@pytest.mark.filterwarnings("ignore:You have passed exclude_modules")  # PEFT, which sees no projections
@pytest.mark.parametrize("excluded", [["down_proj"], ["experts.down_proj"], r".*experts\.down_proj"], ids=str)
def test_projections_of_experts_can_be_excluded(excluded: Any, tmp_path: Path) -> None:
    base = save_tiny_checkpoint(tmp_path / "base", **ALL_EXPERTS)
    config = LoraConfig(target_modules=["experts"], exclude_modules=excluded, init_lora_weights=False)
    model = get_peft_model(load(base), config)
    for layer in lora_layers(model):
        assert layer.lora_A["default"].keys() == {"gate", "up"}
    kt_moe.save_adapter(model, tmp_path / "adapter")
    wanted = model.eval()(tokens()).logits
    assert torch.equal(kt_moe.load_adapter(load(base), tmp_path / "adapter")(tokens()).logits, wanted)


def test_a_pattern_of_a_fused_name_warns_where_projections_are_targeted(tmp_path: Path) -> None:
    base = save_tiny_checkpoint(tmp_path / "base", **ALL_EXPERTS)
    config = LoraConfig(target_modules=["experts"], rank_pattern={"experts.gate_up_proj": 2})
    with pytest.warns(
        RuntimeWarning, match=r"rank_pattern has \['experts.gate_up_proj'\], which match nothing"
    ):
        get_peft_model(load(base), config)
