"""What transformers, peft and megatron-fsdp do not publish."""

from __future__ import annotations

import functools
import inspect
from typing import Any, Callable, Iterable, Sequence

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

__all__ = [
    "DECLARED_PLANS",
    "RESETS",
    "as_stored",
    "attention_of",
    "block_classes",
    "holds_experts",
    "initialiser_of",
    "is_megatrons",
    "keep_ties",
    "maker_of_mask",
    "mark_tensor_parallel",
    "name_attention",
    "names_attention",
    "never_packed",
    "plan_of_head",
    "show_sharded",
    "split_experts",
    "why_not_adapted",
]


def maker_of_mask(function: Callable[..., Any]) -> tuple[str, dict[str, Any]] | None:
    """(name, values) of the function of transformers that made a mask function, and what it made it of; None: another.

    transformers 5.23 hands mask functions of (batch, head, query, key) to the registered mask interface; what they are
    (causal, a window of so many keys) is in the closure that masking_utils makes them with, and nowhere else. One that
    is not recognised is evaluated block by block, which is as right and slower.
    Test: tests/runtime/techniques/test_mask_rules.py.
    """
    if getattr(function, "__module__", None) != "transformers.masking_utils":
        return None
    name = getattr(function, "__qualname__", "").partition(".")[0]
    return name, dict(inspect.getclosurevars(function).nonlocals)


def names_attention(config: Any) -> bool:
    """Whether an object is a config that names an implementation of attention, or could.

    transformers 5.17 to 5.23. Test: tests/dist/test_context_parallel.py, test_equals_one_process.
    """
    return hasattr(config, "_attn_implementation") and isinstance(config._attn_implementation, (str, type(None)))


def attention_of(config: Any) -> str | None:
    """The name of the implementation of attention that a config asks the registry for.

    transformers 5.17 to 5.23: ``attn_implementation`` is an argument of models and of nothing that has been built.
    Test: tests/dist/test_context_parallel.py, test_equals_one_process.
    """
    return config._attn_implementation


def name_attention(configs_and_names: Iterable[tuple[Any, str | None]]) -> None:
    """Let each config ask the registry for another implementation of attention.

    transformers 5.17 to 5.23: the published ``set_attn_implementation`` is one of models, and takes what it knows. A
    config hands its choice down to those inside of it, which may have another, so outer ones come first.
    Test: tests/dist/test_context_parallel.py, test_equals_one_process.
    """
    for config, name in sorted(configs_and_names, key=lambda pair: -len(getattr(pair[0], "sub_configs", ()))):
        config._attn_implementation = name


def never_packed() -> None:
    """Answer the question whether a batch is packed with a plain False, for the whole process.

    transformers 5.17 to 5.23 (modeling_flash_attention_utils.py): the original compares tensors, which waits for the
    device in every attention layer. Test: tests/dist/test_fields.py, test_the_patch_answers_that_no_batch_is_packed.
    """
    from transformers import modeling_flash_attention_utils as flash

    flash._is_packed_sequence = _is_not_packed


def _is_not_packed(position_ids: Any, batch_size: Any) -> bool:
    return False


def block_classes(model: nn.Module) -> Sequence[str] | None:
    """Names of the classes of a model's layers, if it says them.

    transformers 5.17 to 5.23: what must stay on one device, which no property tells.
    Test: tests/runtime/model/test_blocks.py, test_a_transformers_models_declaration_is_used.
    """
    return getattr(model, "_no_split_modules", None)


def holds_experts(module: nn.Module) -> bool:
    """Whether a module is the experts of a layer.

    transformers 5.17 to 5.23 mark their classes so.
    Test: tests/dist/test_expert_parallel.py, test_the_balancing_loss_is_that_of_the_whole_batch.
    """
    return hasattr(module, "_is_expert_parallel")


def plan_of_head(model: nn.Module) -> Any:
    """The tensor-parallel plan that a class of models has for what it adds to its base model, its head; else None.

    transformers 5.17 to 5.23: the published ``tp_plan`` of a model is in the styles of transformers, with those inside.
    Test: tests/dist/test_tensor_parallel.py, test_training_equals_one_process.
    """
    return getattr(type(model), "_tp_plan", None)


#: Attributes by which a module that is none of transformers declares its plan, as one of transformers would.
#: transformers 5.17 to 5.23: the second is the one that classes set.
#: Test: tests/dist/test_tensor_parallel.py, test_training_equals_one_process.
DECLARED_PLANS = ("tp_plan", "_tp_plan")


def as_stored(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """A model's state under the names, and in the parts, in which its files have it; None: transformers keeps no other.

    transformers 5.17 to 5.23 do this where a model is saved, with no function of its own that is published.
    Raises what a conversion raises. Test: tests/dist/test_load.py, test_experts_that_are_stored_one_by_one.
    """
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        return None
    return revert_weight_conversion(model, state)


def split_experts(model: nn.Module, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh, plan: dict[str, str]) -> bool:
    """Split the experts of a model by its plan, in place; False where this version of transformers cannot.

    transformers 5.23: the published way does it while it loads a model whole. tp_mesh: ranks with the same tokens.
    Test: tests/dist/test_expert_parallel.py, test_equals_one_process.
    """
    try:
        from transformers.distributed.expert_parallel import apply_expert_parallelism
    except ImportError:
        return False
    apply_expert_parallelism(model, ep_mesh, tp_mesh, plan, "all_to_all")
    return True


def initialiser_of(model: nn.Module, module: nn.Module) -> Callable[[], Any] | None:
    """What sets the initial values of one module of a model; None where nothing does.

    transformers 5.17 to 5.23: a model sets those of its modules one by one in ``_init_weights``, and in all of them in
    the published ``init_weights``. Test: tests/runtime/model/test_trial.py.
    """
    of_model = getattr(model, "_init_weights", None)
    if callable(of_model):
        return functools.partial(of_model, module)
    return next(filter(callable, (getattr(module, name, None) for name in RESETS)), None)


#: Methods by which modules of torch set their values anew. torch 2.11 to 2.13: MultiheadAttention has the second one.
#: Test: tests/runtime/model/test_meta_modules.py, test_a_module_on_meta_starts_as_its_modules_reset_themselves.
RESETS = ("reset_parameters", "_reset_parameters")


def show_sharded(wrapped: Any) -> None:
    """Let a wrapped model's parameters be the shards that its optimizer updates.

    megatron-fsdp 0.6: after a forward they are what was gathered, until the library's own optimizer step.
    Test: tests/dist/test_megatron_fsdp.py, test_a_plain_loop_is_right.
    """
    wrapped._replace_param_with_distributed_if_needed()


def keep_ties(wrapped: Any, names: int) -> None:
    """Let a parameter that a wrapped model has under so many names stay one, however often the library replaces it.

    megatron-fsdp 0.6 looks for the other names of what it has replaced once, and finds one of them: a third keeps what
    the library has freed, and the process ends. Each time it looks, it finds one more.
    Test: tests/runtime/engines/test_megatron_models.py, test_a_step_is_that_of_one_process.
    """
    look = wrapped._reestablish_shared_weights

    def look_for_all(old: dict[str, Any], new: dict[str, Any]) -> None:
        for _ in range(names - 1):
            look(old, new)

    wrapped._reestablish_shared_weights = look_for_all
    look_for_all(wrapped.raw_param, dict(wrapped.param_and_grad_buffer.optimizer_named_parameters))


def is_megatrons(parameter: Tensor) -> bool:
    """Whether megatron-fsdp shards a parameter.

    megatron-fsdp 0.6 marks them so, on every rank, those of which a rank holds nothing among them.
    Test: tests/dist/test_megatron_fsdp.py, test_gradients_that_are_not_finite_stop_all_ranks_unless_told_otherwise.
    """
    return hasattr(parameter, "_megatron_fsdp_model")


def mark_tensor_parallel(parameter: nn.Parameter, dim: int) -> None:
    """Tell megatron-fsdp that a parameter is a rank's part of one that tensor parallelism splits in this dimension.

    megatron-fsdp 0.6 takes the marks of Megatron-LM. Test: tests/dist/test_megatron_fsdp.py, test_equals_one_process.
    """
    marked: Any = parameter
    marked.tensor_model_parallel, marked.partition_dim, marked.partition_stride = True, dim, 1
    marked._tensor_parallel_mode = "column" if dim == 0 else "row"


def why_not_adapted(model: nn.Module, name: str) -> str:
    """Why peft puts no adapter into a layer of this name, as it says; "" where it does.

    peft 0.19 to 0.21: fused kernels of state-space models read some weights past their layers, which it finds out while
    it replaces the layers one by one. Test: tests/contract/test_adapters.py, test_what_peft_refuses_is_left_out.
    """
    import peft
    from peft.tuners import tuners_utils

    check = getattr(tuners_utils, "_check_lora_target_modules_mamba", None)
    try:
        if check is not None:
            check(peft.LoraConfig(), model, name.rpartition(".")[2])
    except ValueError as error:
        return str(error).partition("] ")[2].partition(". ")[0] or str(error)
    return ""
