"""The weight table's sources -> where they are in a checkpoint: in which of its tensors, from which row on.

Families name and join tensors in their own ways. In: a ModelConfig, and the names and shapes of a checkpoint's tensors. Out: a
`Place` for each source, or an error that lists what does not fit. Reads nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from llmpack.families import FAMILIES, SEEING
from llmpack.weights import EMBEDDING, HEAD, source_shape, weight_rows
from llmrun.artifact import IntegrityError, ModelConfig

# Tensors of other names than in a Llama, and the sources that each holds; both counted from the layer.
_TENSORS: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "GlmForCausalLM": (("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj")),),
    "Glm4ForCausalLM": (
        ("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj")),
        ("post_self_attn_layernorm", ("post_attention_layernorm",)),
        ("post_attention_layernorm", ("pre_feedforward_layernorm",)),
        ("post_mlp_layernorm", ("post_feedforward_layernorm",)),
    ),
    "Phi3ForCausalLM": (
        ("self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj")),
    ),
    "GraniteMoeHybridForCausalLM": (
        ("shared_mlp.input_linear", ("mlp.gate_proj", "mlp.up_proj")),
        ("shared_mlp.output_linear", ("mlp.down_proj",)),
    ),
}
# Routers and experts of other names than in a Qwen; "{}" is an expert's number, without which a tensor holds all of them.
_EXPERTS: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "GptOssForCausalLM": (
        ("mlp.router.weight", ("gate.weight",)),
        ("mlp.router.bias", ("gate.bias",)),
        ("mlp.experts.gate_up_proj", ("gate_proj.weight", "up_proj.weight")),
        ("mlp.experts.gate_up_proj_bias", ("gate_proj.bias", "up_proj.bias")),
        ("mlp.experts.down_proj", ("down_proj.weight",)),
        ("mlp.experts.down_proj_bias", ("down_proj.bias",)),
    ),
    "MixtralForCausalLM": (
        ("block_sparse_moe.gate.weight", ("gate.weight",)),
        ("block_sparse_moe.experts.{}.w1.weight", ("gate_proj.weight",)),
        ("block_sparse_moe.experts.{}.w3.weight", ("up_proj.weight",)),
        ("block_sparse_moe.experts.{}.w2.weight", ("down_proj.weight",)),
    ),
    "GraniteMoeForCausalLM": (
        ("block_sparse_moe.router.layer.weight", ("gate.weight",)),
        ("block_sparse_moe.input_linear.weight", ("gate_proj.weight", "up_proj.weight")),
        ("block_sparse_moe.output_linear.weight", ("down_proj.weight",)),
    ),
}
# The same as transformers 5 has them in memory, and saves them where it is told not to save them as they are published.
_IN_MEMORY = tuple(
    (
        router,
        (f"{mlp}.experts.gate_up_proj", ("gate_proj.weight", "up_proj.weight")),
        (f"{mlp}.experts.down_proj", ("down_proj.weight",)),
    )
    for mlp, router in (
        ("mlp", ("mlp.gate.weight", ("gate.weight",))),
        ("block_sparse_moe", ("block_sparse_moe.router.weight", ("gate.weight",))),
    )
)
# ERNIE's numbers that are added to a router's scores: as published, and as transformers 5 has them in memory.
_STATICS = ("mlp.moe_statics.e_score_correction_bias", "mlp.gate.moe_statics.e_score_correction_bias")
# Of a model that sees images: how the names of its language model begin, and what they begin with in a model that is nothing
# else; first as they are published and saved, then as transformers calls its modules.
_LANGUAGE_MODEL = (("language_model.", ""), ("model.language_model.", "model."))
_SEEING = {FAMILIES[language].architecture for seeing in SEEING.values() for language in seeing.languages}
# And the parts that are not packed.
_EYES = tuple(f"{prefix}{part}." for prefix in ("", "model.") for part in ("vision_tower", "multi_modal_projector"))


@dataclass(frozen=True)
class Place:
    """Where a source is in the checkpoint: in rows of a tensor, from the first one on; of several matrices, all rows count.

    `step`: rows from one to the next, where those of several sources take turns; `first_column`: where they lie side by side.
    """

    tensor: str
    first_row: int = 0
    step: int = 1
    first_column: int = 0


@dataclass(frozen=True)
class _Tensor:
    """A tensor that the checkpoint should have, and the sources in it, in order.

    Attributes:
        is_stacked: its axes are [num_experts, rows, columns].
        takes_turns: how many sources' rows take turns.
        is_beside: its sources lie side by side, and not one under another.
    """

    name: str
    sources: tuple[str, ...]
    is_stacked: bool = False
    takes_turns: int = 1
    is_beside: bool = False

    def shape(self, config: ModelConfig) -> tuple[int, ...]:
        """Return the shape that it should have."""
        shapes = [source_shape(config, source) for source in self.sources]
        if self.is_beside:
            return (shapes[0][0], sum(shape[1] for shape in shapes))
        rows = sum(shape[0] for shape in shapes)
        if self.is_stacked:
            return (config.num_experts or 0, rows // (config.num_experts or 1), *shapes[0][1:])
        return (rows, *shapes[0][1:])

    def places(self, config: ModelConfig) -> Iterator[tuple[str, Place]]:
        """Return each source, and where it is in the tensor."""
        if self.is_beside:
            width = source_shape(config, self.sources[0])[1]
            yield from ((s, Place(self.name, first_column=i * width)) for i, s in enumerate(self.sources))
            return
        first_row, turns = 0, self.takes_turns
        for begin in range(0, len(self.sources), turns):
            together = self.sources[begin : begin + turns]
            yield from ((source, Place(self.name, first_row + i, turns)) for i, source in enumerate(together))
            first_row += sum(source_shape(config, source)[0] for source in together)


def _tensors_of(config: ModelConfig, found: Iterable[str]) -> Iterator[_Tensor]:
    """Return the tensors of the whole table, named as some that are there."""
    experts = _EXPERTS.get(config.architecture, ())
    ends = {name.partition(".layers.")[2].partition(".")[2] for name in found}
    if not config.has_expert_biases:
        experts = next((table for table in _IN_MEMORY if table[1][0] in ends), experts)
    if config.architecture == "Ernie4_5_MoeForCausalLM":
        statics = next((name for name in _STATICS if name in ends), _STATICS[0])
        experts = (*experts, (statics, ("gate.e_score_correction_bias",)))
    done: set[str] = set()
    for source in (source for row in weight_rows(config) for source in row.sources):
        if source not in done:
            tensor = _expert_tensor(config, experts, source) or _renamed(config, source) or _Tensor(source, (source,))
            done |= {*tensor.sources}
            yield tensor


def _renamed(config: ModelConfig, source: str) -> _Tensor | None:
    """Return the tensor of another name that holds a source; None: one of its own."""
    root, _, kind = source.rpartition(".")
    layers, _, path = root.partition(".layers.")
    number, _, name = path.partition(".")
    for tensor, parts in _TENSORS.get(config.architecture, ()):
        if name in parts:
            layer = f"{layers}.layers.{number}"
            return _Tensor(f"{layer}.{tensor}.{kind}", tuple(f"{layer}.{part}.{kind}" for part in parts))
    return None


def _expert_tensor(config: ModelConfig, tensors: Iterable[tuple[str, tuple[str, ...]]], source: str) -> _Tensor | None:
    """Return the same of a router or an expert, which `tensors` have."""
    layer, _, path = source.partition(".mlp.")
    expert, _, name = path.removeprefix("experts.").rpartition(".")[0].rpartition(".")
    name = f"{name}.{source.rpartition('.')[2]}"
    first_shared = config.num_experts or 0
    if expert and int(expert) >= first_shared:
        numbers = range(first_shared, config.num_all_experts)
        sources = tuple(f"{layer}.mlp.experts.{i}.{name}" for i in numbers)
        return _Tensor(f"{layer}.mlp.shared_experts.{name}", sources, is_beside=name.startswith("down_proj."))
    for tensor, parts in tensors:
        if name not in parts or not (expert or name.startswith("gate.")):
            continue
        if not expert:
            return _Tensor(f"{layer}.{tensor}", (source,))
        is_stacked = "{}" not in tensor
        numbers = [str(i) for i in range(config.num_experts or 0)] if is_stacked else [expert]
        sources = tuple(f"{layer}.mlp.experts.{i}.{part}" for i in numbers for part in parts)
        turns = len(parts) if config.has_expert_biases else 1
        return _Tensor(f"{layer}.{tensor.format(expert)}", sources, is_stacked, turns)
    return None


def resolve_sources(config: ModelConfig, found: dict[str, tuple[int, ...]]) -> dict[str, Place]:
    """Match the table with the tensors of a checkpoint.

    Args:
        config: the architecture.
        found: tensor name -> shape.

    Returns:
        source name in the table -> where it is read: in the tensor of that name but for tied embeddings stored once, and in
        families that store some in one tensor (q, k and v; gate and up; all experts), or under another name.

    Raises:
        IntegrityError: a tensor is missing, has another shape, or is unknown (all are listed).
    """
    tensors = _language_model(config, found)
    found = {name: found[tensor] for name, tensor in tensors.items()}
    if config.num_hidden_layers > len(found):  # before a table of that many layers is made
        raise IntegrityError(
            f"config.json has num_hidden_layers {config.num_hidden_layers}, but the files hold only {len(found)} tensors.",
            code="E313",
        )
    shapes: dict[str, tuple[int, ...]] = {}  # of the tensors
    places: dict[str, Place] = {}
    for tensor in _tensors_of(config, found):
        shapes[tensor.name] = tensor.shape(config)
        places.update(tensor.places(config))
    names = {tensor: tensor for tensor in shapes}
    if config.tie_word_embeddings:
        pair = (f"{EMBEDDING}.weight", f"{HEAD}.weight")
        present = [name for name in pair if name in found]
        names.update({name: present[0] for name in pair if present and name not in found})
    missing = sorted({name for name in names.values() if name not in found})
    # Older checkpoints carry RoPE's frequencies, which follow from the configuration.
    ignored = _guessing(config, found)
    unknown = sorted(
        n for n in found if n not in shapes and not n.endswith(".rotary_emb.inv_freq") and not n.startswith(ignored)
    )
    if missing or unknown:
        raise IntegrityError(
            f"the tensors do not fit config.json; missing: {_listed(missing)}; not known to a model of this configuration:"
            f" {_listed(unknown)}.",
            code="E313",
        )
    for tensor, name in names.items():
        if found[name] != shapes[tensor]:
            raise IntegrityError(
                f"{name}: shape {list(found[name])}, but config.json asks for {list(shapes[tensor])}.", code="E313"
            )
    return {source: replace(place, tensor=tensors[names[place.tensor]]) for source, place in places.items()}


def guesses_further(config: ModelConfig, found: Iterable[str]) -> bool:
    """Tell whether a checkpoint has layers that guess tokens further on, which are not packed."""
    names = {*found}
    return any(name.startswith(_guessing(config, names)) for name in names)


def _guessing(config: ModelConfig, found: Iterable[str]) -> tuple[str, ...]:
    """Return how the names of those layers begin that guess tokens further on, which are not packed (transformers' MTP)."""
    if config.architecture.startswith("Ernie4_5"):
        return ("model.mtp_",)
    after = f"model.layers.{config.num_hidden_layers}."
    is_one = config.architecture == "Glm4MoeForCausalLM" and f"{after}eh_proj.weight" in found
    return (after,) if is_one else ()


def sees_images(config: ModelConfig, found: Iterable[str]) -> bool:
    """Tell whether a checkpoint has parts for images, which are not packed."""
    return config.architecture in _SEEING and any(name.startswith(_EYES) for name in found)


def _language_model(config: ModelConfig, found: Iterable[str]) -> dict[str, str]:
    """Return the tensors of the language model, by the names that they have in a checkpoint of nothing else."""
    names = {name: name for name in found}
    if config.architecture not in _SEEING:
        return names
    for prefix, plain in _LANGUAGE_MODEL:
        for name in [name for name in names if name.startswith(prefix)]:
            names.setdefault(plain + name.removeprefix(prefix), names.pop(name))
    return {name: tensor for name, tensor in names.items() if not name.startswith(_EYES)}


def _listed(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "none"
