"""How large a model is and what a training step of it keeps, from config.json alone.

The model is built on PyTorch's ``meta`` device, where tensors have shapes and no contents: a 27B model takes a second
and no memory there. With its adapter in place it computes a batch, and autograd tells what it would keep for the
backward pass. So the figures follow the model's own code, and ours, without a table of architectures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_tune.answers.lengths import keys_of_a_token
from gemma_tune.base.machine import is_out_of_memory
from gemma_tune.config.stages import TrainConfig
from gemma_tune.lora.experts import chosen_of, share_of
from gemma_tune.lora.files import Adapter
from gemma_tune.lora.start import names_in, patterns_of, targets_from
from gemma_tune.lora.targets import Targets, lora_config, targets_of
from gemma_tune.lora.whole import LINEAR, kind_of, whole_modules

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

# Where a model's code cannot run on shapes (it looks at values): how many numbers are kept for each that goes into or
# comes out of an adapted layer. Gemma 3 270M keeps 1.3, SmolLM2 1.1.
KEPT_PER_NUMBER = 2
_ATTENTION = "gemma_tune_counted"


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a base model with its adapter.

    Attributes:
        parameters: numbers of the base model; tied embeddings count once.
        linear: those of them that ``--qlora`` keeps in 4 bits: in linear layers, but not in the head.
        active: those that each token is multiplied with, without embeddings and head; of experts, the chosen share.
        adapter: numbers that are trained: of the adapter, and of modules as a whole.
        adapter_active: those of LoRA that each token is multiplied with; of experts, the chosen share.
        adapted: how many linear layers the adapter is on.
        experts: how many parameters that hold a layer's experts it is on.
        head: numbers of the head, vocabulary x hidden size.
        hidden: hidden size.
        widest: the most numbers of one token that go into or come out of an adapted layer.
        layers: blocks of the text model.
        attention: query heads x their width.
        item: bytes of a number in the compute type.
        large: numbers of the base in weights that can be kept narrow.
        narrow: whether they are, in 2 bytes each, and widened for their products.
        kept: bytes that autograd keeps for the backward pass, head excluded, of so many rows of so many tokens.
        whole: numbers of the modules that are trained as a whole, which are among those of the adapter.
        resting: those of them that the base's own modules have on the disk alone while steps are made, see
            ``base_weights``.
        begun: those of them that began as an adapter has them, which is kept to be compared with.
        whole_active: those of them that each token is multiplied with, head excluded.
        modules: how many modules that are.
        cached: numbers of keys and values that all layers keep of a token while an answer is made; 0 where
            none is.
        head_trained: the head is among them, by itself or as the embedding.
        model: with its adapter, on the meta device.
    """

    parameters: int
    linear: int
    active: int
    adapter: int
    adapter_active: int
    adapted: int
    experts: int
    head: int
    hidden: int
    widest: int
    layers: int
    attention: int
    item: int
    kept: Callable[[int, int], int]
    whole: int = 0
    resting: int = 0
    begun: int = 0
    whole_active: int = 0
    modules: int = 0
    cached: int = 0
    large: int = 0
    narrow: bool = False
    head_trained: bool = False
    model: Any = field(default=None, compare=False, repr=False)


def shape_of(checkpoint: Path, config: TrainConfig, dtype: torch.dtype, start: Adapter | None = None,
             device: str = "cpu", narrow: bool = False) -> ModelShape:
    """Measure the model of ``checkpoint/config.json``; the weights need not be there.

    Args:
        config: for the adapter's rank and layers.
        dtype: the compute type.
        start: the adapter that is trained further; its layers and ranks count.
        device: where it will be trained, as the layers of a GPU keep less.
        narrow: whether large weights are kept in 2 bytes.

    Raises:
        UserError: a model type that transformers does not know, ``--target-modules`` that the model does not have, or
            an adapter that does not fit it.
    """
    import torch

    from gemma_tune.models.narrow import is_large

    text_config, model = _without_weights(checkpoint, dtype)
    head = model.get_output_embeddings().weight
    names = names_in(model, start) if start else {}
    targets = targets_from(model, start, names) if start else targets_of(model, config)
    if start and config.qlora:  # which none of what the adapter has as a whole may be in
        whole_modules(model, config.modules_to_save, four_bit=True)
    whole = [model.get_submodule(name) for name in targets.whole]
    matrices = [module for module in whole if kind_of(module) == LINEAR and module.weight is not head]
    adapted = [(module.in_features, module.out_features)
               for module in (*map(model.get_submodule, targets.layers), *matrices)]
    # A token goes through some of the experts, each time in a row of its own.
    adapted += [(chosen_of(model) * inner, chosen_of(model) * outer)
                for _, outer, inner in (model.get_parameter(name).shape for name in targets.parameters)]
    linear = {id(module.weight): module.weight.numel() for module in model.modules()
              if isinstance(module, torch.nn.Linear) and module.weight is not head}
    parameters, active = sum(p.numel() for p in model.parameters()), _active(model)
    large = sum(p.numel() for p in model.parameters() if is_large(p))
    through = sum(map(sum, adapted))
    with_adapter = _adapted(model, config, targets, patterns_of(start, names) if start else {})
    on_layers, on_experts = _trained(with_adapter)
    in_whole = sum(p.numel() for module in whole for p in module.parameters())
    return ModelShape(
        parameters=parameters, linear=sum(linear.values()),
        active=active,
        adapter=on_layers + on_experts,
        adapter_active=on_layers - in_whole + round(on_experts * share_of(model)),
        adapted=len(targets.layers), experts=len(targets.parameters), head=head.numel(), hidden=text_config.hidden_size,
        widest=max(map(max, adapted)), layers=text_config.num_hidden_layers,
        attention=_attention_width(text_config),
        item=dtype.itemsize, kept=_counter(with_adapter, through, torch.device(device)),
        cached=keys_of_a_token(text_config) if config.method == "grpo" else 0,
        large=large, narrow=narrow,
        whole=in_whole, resting=sum(p.numel() for module in whole for p in module.parameters() if p.ndim > 1),
        begun=in_whole if start else 0,
        whole_active=sum(module.weight.numel() for module in matrices), modules=len(whole),
        head_trained=targets.tied or any(module.weight is head for module in whole if hasattr(module, "weight")),
        model=with_adapter)


def _trained(with_adapter: Any) -> tuple[int, int]:
    """Numbers of an adapter on layers, and on experts."""
    from peft.tuners.lora.layer import ParamWrapper

    trained = {id(p): p.numel() for p in with_adapter.parameters() if p.requires_grad}
    experts = {id(p): p.numel() for module in with_adapter.modules() if isinstance(module, ParamWrapper)
               for p in module.parameters() if p.requires_grad}
    return sum(trained.values()) - sum(experts.values()), sum(experts.values())


def adapted_layers(checkpoint: Path, adapter: Adapter) -> dict[str, str]:
    """What the model of ``checkpoint/config.json`` calls the layers of an adapter.

    Raises:
        UserError: it does not have all of them in their shapes.
    """
    import torch

    return names_in(_without_weights(checkpoint, torch.float32)[1], adapter)


def _attention_width(config: PretrainedConfig) -> int:
    """Heads times their width, of the widest layer: Gemma 4 has two widths. 0 for a family without attention."""
    if getattr(config, "is_heterogeneous", False):
        return max(map(_attention_width, config.per_layer_config))
    heads = getattr(config, "num_attention_heads", 0)
    return heads * (getattr(config, "head_dim", None) or config.hidden_size // max(1, heads))


def _without_weights(checkpoint: Path, dtype: torch.dtype) -> tuple[PretrainedConfig, PreTrainedModel]:
    """The text model's configuration, and the model on the meta device."""
    from transformers import AttentionInterface

    from gemma_tune.models.known import known_config, needs_package, no_model
    from gemma_tune.models.load import needs_eager_attention, with_decoder

    config, path = known_config(checkpoint), checkpoint / "config.json"
    AttentionInterface.register(_ATTENTION, _counted_attention)
    try:
        attention = "eager" if needs_eager_attention(config.model_type) else _ATTENTION
        model = with_decoder(_on_meta(config, dtype, attention))
    except ImportError as e:
        raise needs_package(path, e) from e
    except Exception as e:  # noqa: BLE001 - in as many ways as its values can miss each other
        if is_out_of_memory(e):
            raise
        raise no_model(path, e) from e
    return config.get_text_config(), model


def _on_meta(config: PretrainedConfig, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    import torch

    from gemma_tune.models.towers import auto_class, without_towers

    with without_towers(config), torch.device("meta"):
        try:
            return auto_class(config.model_type).from_config(config, dtype=dtype, attn_implementation=attention,
                                                  trust_remote_code=False)
        except KeyError:  # a family with a fixed list of attentions, such as Falcon
            return auto_class(config.model_type).from_config(config, dtype=dtype, trust_remote_code=False)


def _active(model: PreTrainedModel) -> int:
    """Numbers of the text model's matrices that one token meets; experts are three-dimensional parameters."""
    import torch

    share = share_of(model)
    tables = [m for m in model.modules() if isinstance(m, torch.nn.Embedding)] + [model.get_output_embeddings()]
    embeddings = {id(p) for module in tables for p in module.parameters()}
    matrices = [p for p in model.get_decoder().parameters() if p.ndim > 1 and id(p) not in embeddings]
    return round(sum(p.numel() * (share if p.ndim == 3 else 1) for p in matrices))


def _adapted(model: PreTrainedModel, config: TrainConfig, targets: Targets, patterns: dict[str, Any]) -> Any:
    """The model with its adapter, and copies of the modules that are trained as a whole."""
    from peft import get_peft_model

    from gemma_tune.lora.dora import start_from_base
    from gemma_tune.lora.routed import install
    from gemma_tune.train.whole import train_whole

    adapted = get_peft_model(model, lora_config(config, targets, **patterns), low_cpu_mem_usage=True).train()
    if config.dora:
        start_from_base(adapted)
    install(adapted)
    if targets.tied:  # which PEFT takes apart where weights have no contents
        head, words = (end.modules_to_save["default"] for end in (model.get_output_embeddings(),
                                                                  model.get_input_embeddings()))
        head.weight = words.weight
    train_whole(adapted)
    return adapted


def _counter(adapted: Any, through: int, device: torch.device) -> Callable[[int, int], int]:
    """``kept`` of :class:`ModelShape`, of a model whose adapted layers have so many inputs and outputs."""
    @cache
    def kept(rows: int, length: int) -> int:
        try:
            return _kept(adapted, rows, length, device)
        except (RuntimeError, NotImplementedError, TypeError, ValueError):
            return rows * length * through * KEPT_PER_NUMBER * adapted.dtype.itemsize

    return kept


def _kept(adapted: Any, rows: int, length: int, device: torch.device) -> int:
    """Bytes of the different tensors that autograd keeps of one forward pass up to the last hidden states."""
    import torch

    from gemma_tune.train.kernels import fast_layers

    own = {tensor.untyped_storage()._cdata for tensor in (*adapted.parameters(), *adapted.buffers())}
    sizes: dict[int, int] = {}
    alive = []  # a tensor that is gone would leave its address to the next one

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            sizes[storage._cdata] = storage.nbytes()
            alive.append(storage)
        return tensor

    with fast_layers(adapted, device), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        last_hidden(adapted, rows, length)
    return sum(sizes.values())


def last_hidden(adapted: Any, rows: int, length: int) -> torch.Tensor:
    """Last hidden states (rows, length, d) of a :attr:`ModelShape.model`: the shape, and how it comes about."""
    import torch

    ids = torch.zeros(rows, length, dtype=torch.long, device="meta")
    eager = adapted.config.get_text_config()._attn_implementation == "eager"
    mask = torch.ones(rows, 1, length, length, dtype=torch.bool, device="meta") if eager else None
    decoder = adapted.get_base_model().get_decoder()
    return decoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state


def _counted_attention(module, query, key, value, attention_mask, sliding_window=None, **_: Any):
    """Stands for PyTorch's fused attention, which the meta device does not have.

    It keeps what that keeps: query, key, value, result and the logarithm of the sums (fp32); where a window needs a
    mask, also the mask in the compute type, and keys and values repeated for every query head.
    """
    import torch

    heads, length = query.shape[1:3]
    masked = bool(sliding_window) and length > sliding_window

    class Kept(torch.autograd.Function):
        @staticmethod
        def forward(ctx, query, key, value):
            # One head for all queries is a view of itself, see repeat_kv of transformers.
            repeated = [x.new_empty(len(x), heads, *x.shape[2:]) if masked and x.shape[1] not in (1, heads) else x
                        for x in (key, value)]
            # Laid out as the projection after it reads it, so that this needs no copy.
            out = query.new_empty(len(query), length, heads, value.shape[-1]).transpose(1, 2)
            sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
            mask = [query.new_empty(len(query), 1, length, length)] if masked else []
            ctx.save_for_backward(query, *repeated, out, sums, *mask)
            ctx.like = [x.new_empty_strided(x.shape, x.stride()) for x in (query, key, value)]
            return out

        @staticmethod
        def backward(ctx, grad):
            return tuple(map(torch.empty_like, ctx.like))

    return Kept.apply(query, key, value).transpose(1, 2), None
