"""Bad input: every argument that is wrong is named, with what it was and what was wanted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from strategies import make_problem

import kt_moe

ALL = {"gate": 4, "up": 4, "down": 4}
CPU_FLAGS = set(Path("/proc/cpuinfo").read_text().split())


@pytest.fixture(scope="module")
def good() -> dict:
    p = make_problem(5, 16, 24, 3, 2, ALL)
    experts = kt_moe.Experts(*p.weights, runtime=kt_moe.Runtime(threads=1))
    return {
        "hidden_states": p.hidden_states,
        "topk_ids": p.topk_ids,
        "topk_weights": p.topk_weights,
        "experts": experts,
        "lora": kt_moe.Lora(2.0),
        **p.lora,
    }


class _Wrapper(torch.Tensor):
    """A subclass that, like FakeTensor and DTensor, has a shape but no memory of its own."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> _Wrapper:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _Wrapper(args[0]) if function is torch.ops.aten.detach.default else NotImplemented


CASES = [
    (
        "hidden_states",
        lambda t: t.double(),
        r"hidden_states is torch\.float64, wanted bfloat16, float16 or float32",
    ),
    ("hidden_states", lambda t: t.long(), r"hidden_states is torch\.int64"),
    ("hidden_states", lambda t: t[:, :15], r"hidden_states has shape \[5, 15\], wanted \[T, 16\]"),
    ("hidden_states", lambda t: t[None], r"hidden_states has shape \[1, 5, 16\], wanted 2 dim.*: \[T, H\]"),
    ("topk_ids", lambda t: t[:4], r"topk_ids has shape \[4, 2\], wanted \[5, K\]"),
    ("topk_ids", lambda t: t.float(), r"topk_ids is torch\.float32, wanted int64 or int32"),
    ("topk_ids", lambda t: t + 3, r"topk_ids\[0, \d\] is \d, wanted an expert in \[0, 3\) or 3 for no route"),
    ("topk_ids", lambda t: t - 3, r"topk_ids\[0, 0\] is -"),
    ("topk_ids", lambda t: t[0], r"topk_ids has shape \[2\], wanted 2 dimensions"),
    (
        "topk_weights",
        lambda t: t[:, :1],
        r"topk_weights has shape \[5, 1\], wanted the shape of topk_ids = \[5, 2\]",
    ),
    ("topk_weights", lambda t: t.long(), r"topk_weights is torch\.int64, wanted a floating-point dtype"),
    (
        "gate_lora_a",
        lambda t: t[:, :, :15],
        r"gate_lora_a has shape \[3, 4, 15\], wanted \[E, r, H\] = \[3, 4, 16\]",
    ),
    (
        "gate_lora_a",
        lambda t: t[:2],
        r"gate_lora_a has shape \[2, 4, 16\], wanted \[E, r, H\] = \[3, 4, 16\]",
    ),
    ("gate_lora_a", lambda t: t[:, :0], r"gate_lora_a has rank 0"),
    ("gate_lora_a", lambda t: t.half(), r"gate_lora_a is torch\.float16, wanted float32 or bfloat16"),
    ("gate_lora_a", lambda t: None, r"gate_lora_b is given without gate_lora_a"),
    ("up_lora_b", lambda t: None, r"up_lora_a is given without up_lora_b"),
    ("up_lora_b", lambda t: t[:, :, :3], r"up_lora_b has shape \[3, 24, 3\], .*rank.* = \[3, 24, 4\]"),
    (
        "down_lora_a",
        lambda t: t[..., :20],
        r"down_lora_a has shape \[3, 4, 20\], wanted \[E, r, I\] = \[3, 4, 24\]",
    ),
    ("down_lora_b", lambda t: t[0], r"down_lora_b has shape \[16, 4\], wanted 3 dimensions"),
    ("hidden_states", lambda t: t.to("meta"), "hidden_states is on meta"),
    ("hidden_states", lambda t: t.to_sparse(), r"hidden_states is torch\.sparse_coo, wanted a dense tensor"),
    ("topk_ids", lambda t: _Wrapper(t), "topk_ids is a .*_Wrapper without data of its own"),
    ("gate_lora_a", lambda t: _Wrapper(t), "gate_lora_a is a .*_Wrapper without data of its own"),
]


@pytest.mark.parametrize(("name", "spoil", "message"), CASES)
def test_tensor(good, name, spoil, message):
    with pytest.raises(ValueError, match=message):
        kt_moe.MoEFunction.apply(*{**good, name: spoil(good[name])}.values())


@pytest.mark.parametrize(
    ("name", "value"), [("experts", None), ("lora", 2.0), ("hidden_states", [1.0]), ("topk_ids", None)]
)
def test_type(good, name, value):
    with pytest.raises(TypeError, match=f"{name} is a {type(value).__name__}, wanted"):
        kt_moe.MoEFunction.apply(*{**good, name: value}.values())


def test_moe_keywords(good):
    args = [good[k] for k in ("hidden_states", "topk_ids", "topk_weights", "experts")]
    with pytest.raises(ValueError, match=r"lora_params has the unknown keys \['gate'\]"):
        kt_moe.moe(*args, {"gate": None})
    with pytest.raises(TypeError, match="lora_params is a list, wanted tensors by name"):
        kt_moe.moe(*args, [good["gate_lora_a"], good["gate_lora_b"]])
    with pytest.raises(ValueError, match="scaling is nan, wanted finite numbers"):
        kt_moe.moe(*args, scaling=float("nan"))
    with pytest.raises(ValueError, match="scaling has 2 numbers"):
        kt_moe.moe(*args, scaling=(1.0, 2.0))
    with pytest.raises(ValueError, match=r"dropout is -0\.1"):
        kt_moe.moe(*args, dropout=-0.1)
    with pytest.raises(ValueError, match="seed is -1"):
        kt_moe.moe(*args, seed=-1)
    for keywords in ({"scaling": "2"}, {"scaling": None}, {"dropout": "0.1"}, {"seed": 1.5}):
        with pytest.raises(TypeError, match=rf"{next(iter(keywords))} is .*, wanted a"):
            kt_moe.moe(*args, **keywords)


def test_a_refused_call_leaves_the_runtime_usable(good):
    before = kt_moe.MoEFunction.apply(*good.values())
    with pytest.raises(ValueError, match="topk_ids"):
        kt_moe.MoEFunction.apply(*{**good, "topk_ids": good["topk_ids"] + 3}.values())
    assert torch.equal(kt_moe.MoEFunction.apply(*good.values()), before)


class TestExperts:
    W = torch.zeros(2, 6, 4), torch.zeros(2, 6, 4), torch.zeros(2, 4, 6)

    @pytest.mark.parametrize(
        ("weights", "message"),
        [
            ((W[0], W[1][:1], W[2]), r"up has shape \[1, 6, 4\], wanted .* = \[2, 6, 4\]"),
            ((W[0], W[1], W[0]), r"down has shape \[2, 6, 4\], wanted .* = \[2, 4, 6\]"),
            ((W[0][0], W[1], W[2]), r"gate has shape \[6, 4\], wanted 3 dimensions"),
            (
                (W[0][:0], W[1][:0], W[2][:0]),
                r"gate has shape \[0, 6, 4\], wanted \[E, I, H\] with no dimension 0",
            ),
            ((W[0].long(), W[1], W[2]), r"gate is torch\.int64, wanted bfloat16 or float16 or float32"),
        ],
    )
    def test_weights(self, weights, message):
        with pytest.raises(ValueError, match=message):
            kt_moe.Experts(*weights)

    def test_type(self):
        with pytest.raises(TypeError, match=r"up is a list, wanted a torch\.Tensor"):
            kt_moe.Experts(self.W[0], [1.0], self.W[2])

    def test_names(self):
        with pytest.raises(ValueError, match='activation is "relu", wanted'):
            kt_moe.Experts(*self.W, activation="relu")
        with pytest.raises(ValueError, match=r"format is 'int3', wanted one of \['bf16', 'int8'"):
            kt_moe.Experts(*self.W, format="int3")

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_dequantize_is_the_weights_rounded_to_bf16(self, dtype):
        weights = [torch.randn(s).to(dtype) for s in ((3, 7, 5), (3, 7, 5), (3, 5, 7))]
        experts = kt_moe.Experts(*weights)
        assert (experts.num_experts, experts.hidden_size, experts.intermediate_size) == (3, 5, 7)
        assert experts.nbytes == 3 * 3 * 5 * 7 * 2
        for ours, stored in zip(experts.dequantize(), weights, strict=True):
            assert torch.equal(ours, stored.bfloat16())

    def test_weights_are_copied(self):
        weights = [torch.randn(s) for s in ((1, 2, 3), (1, 2, 3), (1, 3, 2))]
        experts = kt_moe.Experts(*weights)
        before = experts.dequantize()[0]
        weights[0].zero_()
        assert torch.equal(experts.dequantize()[0], before)


class TestRuntime:
    def test_arguments(self):
        sets = kt_moe.cpu_info()["kernel_sets"]
        for kwargs, message in [
            ({"threads": 0}, "threads is 0, wanted a number from 1 to 4096"),
            ({"shards": 65}, "shards is 65, wanted a number from 1 to 64"),
            ({"nodes": [0, 99]}, "nodes names node 99, which is not there"),
            ({"nodes": []}, "nodes is empty, wanted some of the NUMA nodes of this machine"),
            ({"isa": "sse2"}, 'isa is "sse2", wanted one of scalar, '),
            *(({"isa": isa}, f'isa is "{isa}": {why}') for isa, why in sets.items() if why != "available"),
        ]:
            with pytest.raises(ValueError, match=message):
                kt_moe.Runtime(**kwargs)

    @pytest.mark.parametrize(
        ("variable", "value", "message"),
        [
            ("KT_MOE_ISA", "mmx", 'isa is "mmx", wanted one of scalar'),
            ("KT_MOE_THREADS", "two", 'KT_MOE_THREADS is "two", wanted a number from 1 to 4096'),
            ("KT_MOE_NODES", "0,x", 'KT_MOE_NODES is "0,x", wanted NUMA nodes such as "0,2-3"'),
            ("KT_MOE_NODES", "0,99", "nodes names node 99, which is not there"),
            ("KT_MOE_SHARDS", "0", 'KT_MOE_SHARDS is "0", wanted a number from 1 to 64'),
        ],
    )
    def test_environment(self, variable, value, message):
        assert message in _python("import kt_moe; kt_moe.Runtime()", {variable: value}).stderr

    def test_environment_chooses(self):
        code = "import kt_moe as k; r=k.default_runtime(); print(r.isa, r.threads, k.cpu_info()['selected'])"
        assert _python(code, {"KT_MOE_ISA": "scalar", "KT_MOE_THREADS": "3"}).stdout == "scalar 3 scalar\n"

    @pytest.mark.skipif(not {"amx_tile", "amx_bf16"} <= CPU_FLAGS, reason="a CPU without AMX")
    def test_the_kernel_is_asked_for_amx_when_amx_is_chosen(self):
        code = """if True:
            import ctypes, kt_moe
            def permitted():
                bits = ctypes.c_uint64()
                ARCH_PRCTL, ARCH_GET_XCOMP_PERM, TILE_DATA = 158, 0x1022, 18
                assert ctypes.CDLL(None).syscall(ARCH_PRCTL, ARCH_GET_XCOMP_PERM, ctypes.byref(bits)) == 0
                return bool(bits.value >> TILE_DATA & 1)
            found = [permitted()]
            kt_moe.cpu_info()
            kt_moe.Runtime(threads=1, isa="avx2")
            found.append(permitted())
            kt_moe.Runtime(threads=1, isa="amx")
            found.append(permitted())
            print(found)
        """
        assert _python(code, {"KT_MOE_ISA": "avx512"}).stdout == "[False, False, True]\n"

    def test_threads_that_cannot_be_started(self):
        code = """if True:
            import resource, torch, kt_moe
            used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))
            kt_moe.Runtime(threads=4096)
        """
        run = _python(code, {})
        assert "OSError: threads is 4096, but only" in run.stderr
        assert run.returncode == 1

    @pytest.mark.parametrize("shards", [1, 3])
    def test_interpreter_exits_while_threads_compute(self, shards):
        # The core itself, without PyTorch around it, whose own threads may not survive that.
        code = f"""if True:
            import threading, time, torch
            from kt_moe import _core
            runtime = _core.Runtime(3, {shards}, None, None)
            weights = [torch.ones(4, 64, 64)] * 3
            options = None, None, None, "silu", "bf16", runtime, "tensor", None
            experts = _core.Experts.from_tensors(*weights, *options)
            x, out = (torch.ones(256, 64, dtype=torch.bfloat16) for _ in "xo")
            ids, w, lora = torch.zeros(256, 1, dtype=torch.long), torch.ones(256, 1), (None,) * 6
            def work():
                while True:
                    _core.forward(experts, x, ids, w, lora, (1.0, 1.0, 1.0), 0.0, 0, None, out)
            for _ in range(3):
                threading.Thread(target=work, daemon=True).start()
            time.sleep(0.2)
            print("done")
        """
        run = _python(code, {})
        assert (run.stdout, run.returncode) == ("done\n", 0), run.stderr

    def test_the_affinity_of_the_caller_comes_back(self):
        """Threads of several places are bound to their nodes, the calling one during a call alone."""
        code = """if True:
            import os, torch, kt_moe
            node = kt_moe.cpu_info()["nodes"][0]
            e = kt_moe.Experts(*(torch.ones(2, 96, 96),) * 3, runtime=kt_moe.Runtime(threads=2, nodes=[0, 0]))
            x, ids = torch.ones(64, 96), torch.zeros(64, 1, dtype=torch.long)
            before = kt_moe.moe(x, ids, torch.ones(64, 1), e)
            os.sched_setaffinity(0, {node["cpus"][-1]})
            after = kt_moe.moe(x, ids, torch.ones(64, 1), e)
            print(os.sched_getaffinity(0) == {node["cpus"][-1]}, torch.equal(before, after))
        """
        assert _python(code, {}).stdout == "True True\n"

    def test_interpreter_exits_with_a_live_runtime(self):
        code = "import torch, kt_moe; e = kt_moe.Experts(*(torch.zeros(1, 2, 2),) * 3); print('done')"
        run = _python(code, {})
        assert (run.stdout, run.returncode) == ("done\n", 0)


def _python(code: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120)


MODEL, NOTHING = torch.nn.Linear(2, 2), "no such directory"


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: kt_moe.save_adapter(3, NOTHING), "model"),
        (lambda: kt_moe.save_adapter(MODEL, 3), "directory"),
        (lambda: kt_moe.load_adapter(3, NOTHING), "model"),
        (lambda: kt_moe.load_adapter(MODEL, 3), "directory"),
        (lambda: kt_moe.export_adapter(3, NOTHING, target="vllm"), "model"),
        (lambda: kt_moe.export_adapter(MODEL, 3, target="vllm"), "directory"),
        (lambda: kt_moe.merge_checkpoint(3, NOTHING, NOTHING), "base"),
        (lambda: kt_moe.merge_checkpoint(NOTHING, 3, NOTHING), "adapter"),
        (lambda: kt_moe.merge_checkpoint(NOTHING, NOTHING, 3), "output"),
        (lambda: kt_moe.load_model(3), "path"),
        (lambda: kt_moe.device_map(3), "path"),
        (lambda: kt_moe.load_model(NOTHING, 3), "config"),
        (lambda: kt_moe.wrap(3), "model"),
        (lambda: kt_moe.repack(3), "model"),
        (lambda: kt_moe.model_experts(3), "model"),
        (lambda: kt_moe.routing_counts(3), "model"),
        (lambda: kt_moe.KtMoeConfig(nodes=3), "KtMoeConfig: nodes"),
        (lambda: kt_moe.KtMoeConfig(cache_dir=3), "KtMoeConfig: cache_dir"),
        (lambda: kt_moe.MoELayer(3), "experts"),
    ],
)
def test_what_is_no_model_and_no_path_is_refused_by_name(call, name):
    with pytest.raises(TypeError, match=f"^{name} is (a int|3), wanted"):
        call()
