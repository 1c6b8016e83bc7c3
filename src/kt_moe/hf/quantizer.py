"""`from_pretrained(..., quantization_config=KtMoeConfig())`: experts that never become torch parameters."""

from __future__ import annotations

import copy
import functools
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from transformers.integrations.accelerate import get_max_memory
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from kt_moe import checkpointing
from kt_moe import lora_device as lora_devices
from kt_moe.architectures import Architecture, architecture_of
from kt_moe.checkpoint import Checkpoint, check_path
from kt_moe.computation import output_norm
from kt_moe.conversion import stored_lists
from kt_moe.distributed import EXPERT_PARALLEL, is_shared, local_ranks
from kt_moe.expert_parallel import local_experts
from kt_moe.experts import CHECKPOINT_FORMATS, PLACEMENTS, Experts
from kt_moe.families import refuse_config
from kt_moe.gpu import Gpu, Rates, as_gpu
from kt_moe.hf import divided
from kt_moe.hf.experts import NAME, KtExperts, dims_of
from kt_moe.hf.rest import RestQuantizer, as_config
from kt_moe.hf.unmarked import mark
from kt_moe.job import check_alike, check_told, files_text, meet_to_load
from kt_moe.runtime import Runtime, default_runtime
from kt_moe.token_exchange import timeout_of

CHOICES = {
    "format": CHECKPOINT_FORMATS,
    "placement": PLACEMENTS,
    "lora_device": lora_devices.CHOICES,
    "checkpoint_experts": checkpointing.CHOICES,
    "expert_parallel": EXPERT_PARALLEL,
}
# Options that say what is computed. Others, as threads and gpu, may differ between processes of a job.
_ALIKE = ("format", "placement", "recompute", "lora_device", "checkpoint_experts", "expert_parallel", "rest")
_GPU_NAMES = {"device": "gpu", "memory": "gpu_memory"}  # of kt_moe.Gpu, and here


class KtMoeConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """How kt_moe holds and computes the experts of a model.

    Args:
        threads: number of threads that compute experts. None: the cores this process may use.
        shards: number of parts that the weights of an expert are cut into, one a memory node. None: one for
            each node.
        isa: kernel set, such as "avx2". None: the fastest one of this CPU.
        recompute: False saves G and U for the backward pass, True computes them again (see `kt_moe.Experts`).
        format: how the weights are kept in memory: "as-stored", or a format of `kt_moe.Experts` to which they
            are converted while they are loaded.
        cache_dir: directory where packed layers are kept: the next run maps them, and starts at once.
        paged: True leaves the weights in the checkpoint's files, to be paged in when they are used.
        lazy: False loads all experts in from_pretrained, True those of a layer when they are first used.
        placement: how experts are spread over shards: "tensor" puts a slice of every expert on each, "expert"
            whole experts (see `kt_moe.Experts`).
        nodes: memory nodes to use, by number. None: all that this process may use.
        gpu: GPU that computes experts beside the CPU: "auto" (the model's), "cuda:0" or the like, or "off",
            which leaves all experts to the CPU.
        gpu_memory: GPU memory for expert weights: bytes, "6GiB", or "auto", up to half of what is free.
        cpu_share: part of the experts' rows that the CPU computes, 0.0 to 1.0, or "auto", what ends soonest.
        lora_device: where LoRA parameters of the experts lie, with their gradients and optimizer state.
            "cpu": in host memory, wherever the model is moved. "cuda": on the model's device. "auto": on the
            model's device where 16 bytes a parameter are at most a quarter of the memory that is free there
            when the model is moved, else in host memory. In host memory they are refused by
            DistributedDataParallel with device_ids.
        checkpoint_experts: whether gradient checkpointing computes experts again, "recompute", or keeps what
            their backward needs from the first forward, "retain" (see `kt_moe.Experts.checkpoint_experts`).
        gpu_rates: the machine's `kt_moe.Rates`, or their values by name, as `kt-moe doctor` prints them:
            experts are then divided between CPU and GPU alike in every run. None: measured at the first call.
        expert_parallel: where several processes of a job on this machine have the experts. "off": each loads
            them for itself. "host": they lie once in memory that all share (see
            `kt_moe.Experts.from_checkpoint`, `shared`). "auto": "host" where torchrun or accelerate have
            started several processes here (LOCAL_WORLD_SIZE). `cache_dir` and `paged` share in files.
            "global": they are divided over all processes of the job, on whatever machines, each of which has
            the LoRA of its own experts; tokens travel to them. torch.distributed has to be initialised.
            Unless it is "off", the settings of all processes of the job are compared (ValueError).
        rest: how transformers is to quantise the other layers, one of its quantization configs, as
            `BitsAndBytesConfig(load_in_4bit=True)`. None: as they are stored. Where a checkpoint has them
            quantised, its own config is heeded without it; it then changes that one's loading options, as
            `FineGrainedFP8Config(dequantize=True)` does.

    Attributes:
        stored: what the loaded checkpoint's config says of its quantisation; None: nothing.

    Raises:
        TypeError: nodes or cache_dir is something else.
        ValueError: an unknown option or choice, two of `paged`, `cache_dir` and "host", "global" with `lazy`,
            gpu="off" with gpu_memory or cpu_share.
    """

    stored: Any = None

    def __init__(
        self,
        threads: int | None = None,
        shards: int | None = None,
        isa: str | None = None,
        recompute: bool = False,
        format: str = "as-stored",
        cache_dir: str | os.PathLike[str] | None = None,
        paged: bool = False,
        lazy: bool = False,
        placement: str = "tensor",
        nodes: Sequence[int] | None = None,
        gpu: str = "auto",
        gpu_memory: int | str = "auto",
        cpu_share: float | str = "auto",
        lora_device: str = "auto",
        checkpoint_experts: str = "recompute",
        gpu_rates: Rates | Mapping[str, float] | None = None,
        expert_parallel: str = "auto",
        rest: QuantizationConfigMixin | Mapping[str, Any] | None = None,
        **unknown: Any,
    ) -> None:
        self.quant_method = unknown.pop("quant_method", NAME)  # part of every serialised quantization config
        self.threads, self.shards, self.isa = threads, shards, isa
        if nodes is not None and not isinstance(nodes, Iterable):
            raise TypeError(f"KtMoeConfig: nodes is {nodes!r}, wanted a list of numbers or None")
        self.nodes = None if nodes is None else list(nodes)
        self.recompute, self.format = recompute, format
        self.cache_dir = None if cache_dir is None else check_path("KtMoeConfig: cache_dir", cache_dir)
        self.paged, self.lazy, self.placement = paged, lazy, placement
        self.gpu, self.gpu_memory, self.cpu_share = gpu, gpu_memory, cpu_share
        self.lora_device, self.checkpoint_experts = lora_device, checkpoint_experts
        self.gpu_rates = asdict(gpu_rates) if isinstance(gpu_rates, Rates) else gpu_rates
        self.expert_parallel = expert_parallel
        self.rest = as_config(rest)
        if unknown:
            options = [name for name in self.to_dict() if name != "quant_method"]
            raise ValueError(f"KtMoeConfig has no option {sorted(unknown)}, only {options}")
        for name in ("recompute", "paged", "lazy"):
            if not isinstance(value := getattr(self, name), bool):
                raise ValueError(f"KtMoeConfig: {name} is {value!r}, wanted True or False")
        for name, known in CHOICES.items():
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"KtMoeConfig: {name} is {value!r}, wanted one of {list(known)}")
        if paged and cache_dir is not None:
            raise ValueError("KtMoeConfig has paged and cache_dir, wanted one of them")
        if expert_parallel == "host" and (paged or cache_dir is not None):
            raise ValueError(
                'KtMoeConfig has expert_parallel="host" and paged or cache_dir, which share the experts in '
                "files: wanted one of them"
            )
        if expert_parallel == "global" and lazy:
            raise ValueError(
                'KtMoeConfig has expert_parallel="global" and lazy, wanted one of them: ranks compare their '
                "experts when all are loaded"
            )
        made = self.make_gpu()  # refuses its options
        # JSON knows no numbers of numpy.
        self.gpu_memory = gpu_memory if isinstance(gpu_memory, str) else made.memory
        self.cpu_share = cpu_share if isinstance(cpu_share, str) else made.cpu_share
        rates = self._rates()
        self.gpu_rates = None if rates is None else asdict(rates)

    def to_dict(self) -> dict[str, Any]:
        """The options, in values that JSON knows."""
        options = {name: value for name, value in vars(self).items() if name != "stored"}
        return copy.deepcopy(options) | {"rest": None if self.rest is None else self.rest.to_dict()}

    def make_gpu(self) -> Gpu:
        """A new `kt_moe.Gpu` of these options.

        Raises:
            ValueError: an option out of range; names it.
        """
        if not isinstance(self.gpu, str):
            raise ValueError(f'KtMoeConfig: gpu is {self.gpu!r}, wanted "auto", "off" or a name as "cuda:0"')
        rates = self._rates()
        if self.gpu == "off":
            if (self.gpu_memory, self.cpu_share) != ("auto", "auto"):
                raise ValueError('KtMoeConfig has gpu="off" and gpu_memory or cpu_share, wanted one of them')
            return as_gpu("off")
        try:
            return Gpu(self.gpu, self.gpu_memory, self.cpu_share, rates)
        except ValueError as error:
            text = re.sub("^(device|memory) is", lambda found: f"{_GPU_NAMES[found[1]]} is", str(error))
            raise ValueError(f"KtMoeConfig: {text}") from None

    def warn_without_gpu(self) -> None:
        """Warn of options for a GPU where PyTorch finds none."""
        device = self.make_gpu().device
        options = {"gpu": self.gpu, "gpu_memory": self.gpu_memory, "cpu_share": self.cpu_share}
        given = [f"{name}={value!r}" for name, value in options.items() if value not in ("auto", "off")]
        if given and (device is None or device.type == "cuda") and not torch.cuda.is_available():
            warnings.warn(
                f"KtMoeConfig has {', '.join(given)}, which is for a GPU, and PyTorch {torch.__version__} "
                "finds none: the CPU computes all experts",
                stacklevel=2,
            )

    def shares_memory(self) -> bool:
        """Whether experts lie in memory that the processes of this machine share."""
        return is_shared(self.expert_parallel) and not self.paged and self.cache_dir is None

    def new_group(self) -> dist.ProcessGroup | None:
        """A group of all processes, over which experts are divided; None: each process has them all.

        Raises:
            ValueError: torch.distributed is not initialised, and a launcher started several processes. Or
                another process found that settings differ.
            RuntimeError: another process failed, or did not come.
        """
        if self.expert_parallel != "global":
            return None
        if not (dist.is_available() and dist.is_initialized()):
            if (size := os.environ.get("WORLD_SIZE", "1")) != "1":
                raise ValueError(
                    f'expert_parallel="global" among {size} processes (WORLD_SIZE) wants torch.distributed '
                    "initialised before the model is loaded: make the Trainer's arguments first, or call "
                    "init_process_group()"
                )
            return None
        if dist.get_world_size() == 1:
            return None
        divided.watch()
        meet_to_load(timeout_of(None))
        # Of the experts alone: wrappers use that of all processes while backward runs.
        group: dist.ProcessGroup = dist.new_group(timeout=timeout_of(None))
        return group

    def _rates(self) -> Rates | None:
        if self.gpu_rates is None:
            return None
        try:
            return Rates(**self.gpu_rates)
        except TypeError:
            wanted = [rate.name for rate in fields(Rates)]
            raise ValueError(f"KtMoeConfig: gpu_rates is {self.gpu_rates!r}, wanted {wanted}") from None

    def runtime(self) -> Runtime:
        """The runtime these options ask for."""
        options = self.threads, self.shards, self.isa, self.nodes
        return default_runtime() if all(option is None for option in options) else Runtime(*options)


class KtMoeQuantizer(RestQuantizer):
    """Puts `KtExperts` where a model has experts, before and beside transformers' own loading."""

    requires_calibration = False
    quantization_config: KtMoeConfig
    _spread = False

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> Any:
        architecture = architecture_of(model)
        self.quantization_config.warn_without_gpu()
        checkpoint = _open(checkpoint_files)
        lists = stored_lists(model, architecture, checkpoint.tensors)
        self._checkpoint = checkpoint.with_lists(lists) if lists else checkpoint
        if self.quantization_config.expert_parallel != "off":
            options = self.quantization_config.to_dict()
            settings = {name: options[name] for name in _ALIKE}
            of_model = {
                "model": type(model).__name__,
                "dtype": model.dtype,
                "files": files_text(checkpoint.files),
            }
            check_alike("experts", of_model | settings)
        self._runtime, self._gpu = self.quantization_config.runtime(), self.quantization_config.make_gpu()
        self._group = self.quantization_config.new_group()
        _refuse_gptq_v2(self._checkpoint, self.quantization_config.stored)
        self.read_stored(checkpoint, lists, model.dtype, kwargs.get("device_map"))
        # before ours, as some replace modules by their names
        self.rest._process_model_before_weight_loading(model, checkpoint_files=checkpoint_files, **kwargs)
        put_experts(model, architecture, self.quantization_config.lora_device)
        # The checkpoint's expert tensors have no place in the model now, which is no reason to warn.
        inside = {module.path.removeprefix(f"{model.base_model_prefix}.") for module in architecture.modules}
        ignored = {rf"(^|\.){re.escape(path)}\." for path in inside}
        model._keys_to_ignore_on_load_unexpected = ignored | set(
            model._keys_to_ignore_on_load_unexpected or ()
        )
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        modules = {m.expert_module.path: m for m in model.modules() if isinstance(m, KtExperts)}
        load = _Loader(self._checkpoint, self._runtime, self._gpu, self.quantization_config, self._group)
        for module in modules.values():
            same_as = module.expert_module.same_as
            module.load_with(load if same_as is None else _Shared(modules[same_as]))
        if not self.quantization_config.lazy:
            _load_all(list(modules.values()), self._checkpoint)
        for module in modules.values():
            if self._group is not None:
                module.divide(self._group)
        self.rest._process_model_after_weight_loading(model, **kwargs)
        if self.quantization_config.expert_parallel != "off":
            check_told()
        guard_loaded_model(model, self)
        # The model keeps its quantizer, and must stay copyable.
        del self._checkpoint, self._runtime, self._gpu, self._group
        return model

    def update_device_map(self, device_map: Any) -> Any:
        """As the other layers' quantizer does."""
        self._spread = isinstance(device_map, str)  # transformers is to find a map, later
        return super().update_device_map(device_map)

    def update_attn_implementation(self, config: Any) -> Any:
        """As the other layers' quantizer does. ValueError for a config of experts that cannot be computed:
        transformers asks before it fetches weights from the hub.
        """
        config = super().update_attn_implementation(config)
        refuse_config(config)
        return config

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """ValueError where the map that transformers found leaves some layers on the CPU or on disk."""
        super().validate_environment(*args, **kwargs)
        found = kwargs.get("device_map")
        if self._spread and isinstance(found, dict):
            off = sorted(name for name, device in found.items() if device in ("cpu", "disk"))
            if off and len(set(found.values())) > 1:
                raise ValueError(
                    f"the layers beside the experts do not fit the GPUs: {', '.join(off[:3])}"
                    f"{', ...' if len(off) > 3 else ''} would be moved there for each call. Give KtMoeConfig "
                    "less gpu_memory, quantise these layers (rest=), or pass a device_map that names devices"
                )

    def adjust_max_memory(self, max_memory: dict[int | str, Any]) -> dict[int | str, Any]:
        """Of a GPU what is free beside `gpu_memory`, where that is a number."""
        adjusted = super().adjust_max_memory(max_memory)
        gpu = self.quantization_config.make_gpu()
        if isinstance(gpu.memory, int) and gpu.cpu_share != 1.0:
            free = get_max_memory()
            for device in adjusted:
                if isinstance(device, int) and gpu.device in (None, torch.device("cuda", device)):
                    left = max(0, free.get(device, 0) - gpu.memory)
                    adjusted[device] = min(adjusted[device], left)
        return adjusted

    def is_serializable(self) -> bool:
        """True for adapters added by `add_adapter`; saving the base model is refused when it is tried."""
        return True

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, str]]:
        """ValueError unless `save_pretrained` is to write an adapter: the model would lose its experts."""
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}
        raise ValueError(
            "save_pretrained would write this model without its experts, which kt_moe holds outside torch. "
            "The base model is unchanged: keep the checkpoint it was loaded from, save the adapter with "
            "PeftModel.save_pretrained or kt_moe.save_adapter, and merge with kt_moe.merge_checkpoint"
        )

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on it."""
        return True


@dataclass(frozen=True)
class _Loader:
    """Loads the experts of any layer of a checkpoint as a config says; None where this rank is to have none.

    ValueError, before anything is loaded, where their shapes are not those of the model's config.
    """

    checkpoint: Checkpoint
    runtime: Runtime
    gpu: Gpu
    config: KtMoeConfig
    group: dist.ProcessGroup | None

    def __call__(self, module: KtExperts, progress: Callable[[int], object] | None = None) -> Experts | None:
        info = self.checkpoint.layer(module.layer)
        found = (info.num_experts, info.hidden_size, info.intermediate_size)
        if found != (wanted := dims_of(module)):
            raise ValueError(
                f"the checkpoint's experts of layer {module.layer} have (experts, hidden, intermediate) "
                f"{found}, the config says {wanted}"
            )
        part = None if self.group is None else local_experts(info.num_experts, self.group)
        if part is not None and len(part) == 0:
            return None
        experts = Experts.from_checkpoint(
            self.checkpoint,
            module.layer,
            activation=module.expert_module.activation,
            format=self.config.format,
            runtime=self.runtime,
            cache_dir=self.config.cache_dir,
            paged=self.config.paged,
            shared=self.config.shares_memory(),
            progress=progress,
            placement=self.config.placement,
            gpu=self.gpu,
            experts=part,
        )
        experts.recompute = self.config.recompute
        experts.checkpoint_experts = self.config.checkpoint_experts
        return experts


@dataclass(frozen=True)
class _Shared:
    """Takes the experts of another module, whose parameters are its own too."""

    other: KtExperts

    def __call__(self, module: KtExperts, progress: Callable[[int], object] | None = None) -> Experts | None:
        self.other.load(progress)
        return self.other.loaded


def _load_all(modules: Sequence[KtExperts], checkpoint: Checkpoint) -> None:
    own = [module for module in modules if module.expert_module.same_as is None]
    total = sum(checkpoint.layer(module.layer).nbytes for module in own)
    # Processes that share memory begin at different layers, so that each loads some and maps the others.
    rank, size = local_ranks()
    first = rank * len(modules) // size
    with logging.tqdm(total=total, desc="Loading experts", unit="B", unit_scale=True) as bar:
        for module in [*modules[first:], *modules[:first]]:
            module.load(bar.update)


def guard_loaded_model(model: Any, quantizer: KtMoeQuantizer) -> None:
    """What transformers would do wrongly with experts that it does not see is refused when it is tried.

    Args:
        quantizer: becomes the model's: it refuses to save the model without its experts, and has Trainer
            train adapters alone. One that the model has is left the other layers.
    """
    model.load_adapter = _no_load_adapter
    found = getattr(model, "hf_quantizer", None)
    if isinstance(found, KtMoeQuantizer) and found is not quantizer:
        return
    if found is not None and found is not quantizer:
        quantizer.rest, quantizer.pre_quantized = found, found.pre_quantized
    model.hf_quantizer, model.is_quantized = quantizer, True
    of_rest = quantizer.rest.quantization_config  # which transformers and PEFT look at
    decoded = quantizer.pre_quantized and getattr(of_rest, "dequantize", False)
    model.quantization_method = NAME if decoded else of_rest.quant_method


def _no_load_adapter(*args: Any, **kwargs: Any) -> None:
    # transformers would fuse the per-expert keys, find no parameters of that form, and only log it.
    raise NotImplementedError(
        "transformers' own load_adapter cannot load an adapter onto kt_moe experts: use "
        "peft.PeftModel.from_pretrained(model, directory) or kt_moe.load_adapter(model, directory)"
    )


def _refuse_gptq_v2(checkpoint: Checkpoint, stored: Any) -> None:
    """ValueError for experts whose tensors have GPTQ's names and another meaning: only the config tells."""
    found = stored.get if isinstance(stored, Mapping) else functools.partial(getattr, stored)
    if found("checkpoint_format", None) != "gptq_v2":
        return
    if any(checkpoint.layer(layer).layout == "gptq" for layer in checkpoint.layers):
        raise ValueError(
            "the checkpoint's quantization_config has checkpoint_format gptq_v2, wanted gptq for experts: in "
            "that zero points are stored less 1, in gptq_v2 as they are"
        )


def put_experts(model: Any, architecture: Architecture, lora_device: str = "auto") -> None:
    """Replace the experts modules of a transformers model by `KtExperts` that have yet to load."""
    for module in architecture.modules:
        theirs = model.get_submodule(module.path)
        ours = KtExperts(architecture, module, norm=output_norm(theirs))
        ours.lora_device = lora_device
        block = model.get_submodule(module.path.rpartition(".")[0])
        mark(block, theirs)
        model.set_submodule(module.path, ours)
        # Some families initialise the experts' parameters from the block they are in.
        if not [*block.parameters(recurse=False), *block.buffers(recurse=False)]:
            block._is_hf_initialized = True
    if tied := getattr(model, "all_tied_weights_keys", None):
        paths = {module.path for module in architecture.modules}
        model.all_tied_weights_keys = {a: b for a, b in tied.items() if a.rpartition(".")[0] not in paths}


def _open(files: Sequence[str] | None) -> Checkpoint:
    """The checkpoint behind the files that transformers resolved."""
    if not files or not all(file.endswith(".safetensors") for file in files):
        raise ValueError(f"KtMoeConfig loads safetensors checkpoints, this one is {list(files or [])}")
    return Checkpoint(files[0] if len(files) == 1 else os.path.dirname(files[0]))
