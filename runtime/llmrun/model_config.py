"""The architecture of a model, as the manifest's member `model` has it (FORMAT 2.5), and what follows from it.

Standard library only; knows no checkpoint and no graph.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

_OUTPUT_HAS_NO_BIAS = (
    *("Qwen2ForCausalLM", "SeedOssForCausalLM"),
    *("GlmForCausalLM", "Glm4ForCausalLM", "Glm4MoeForCausalLM"),
)
_QK_NORM = ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "Gemma3ForCausalLM")


@dataclass(frozen=True)
class ModelConfig:
    """The architecture; names and (global) numbers as in Hugging Face's config.json.

    Attributes:
        attention_bias: of q, k and v, and of o but in Qwen 2, Seed-OSS and GLM.
        sliding_window: positions that a token sees at most, its own among them, in layers of sliding attention; None: all.
        embedding_multiplier: of the embedding's rows.
        residual_multiplier: of what attention and MLP add to the residual stream.
        attention_multiplier: of a query's product with a key; None: 1 / sqrt(head_dim).
        logits_scaling: what logits are divided by.
        layer_types: of each layer, "sliding_attention" or "full_attention"; None: the former, if there is a sliding_window.
        rope_local: what layers of sliding attention have in place of `rope`; None: that.
        no_rope_layers: of each layer, 1 if q and k are rotated and 0 if not, as transformers has it; None: all are.
        num_experts: MLPs of a sparse layer, of which each token goes through some; None: no layer is sparse.
        num_experts_per_tok: through how many; None without experts, as the next.
        moe_intermediate_size: intermediate_size of an expert.
        norm_topk_prob: whether the weights of a token's experts sum to 1.
        mlp_layer_types: of each layer, "sparse" (it has experts) or "dense"; None: the former, if there are experts.
        num_shared_experts: MLPs of a sparse layer that each token goes through beside those chosen, of their size; None: none.
        routed_scaling_factor: what the weights of the experts that are chosen are multiplied by.
        use_qk_norm: of a model that may have them or not, whether heads of q and of k are normalised.
        swiglu_alpha: of an expert's clamped SwiGLU, what the gate is multiplied by in the logistic function; None: of SwiGLU.
        swiglu_limit: what gate and up are cut off at then; None: nothing.
    """

    architecture: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    rope: dict[str, Any]
    dtype: str
    # Factories: may be absent from a manifest.
    sliding_window: int | None = field(default_factory=lambda: None)
    embedding_multiplier: float = field(default_factory=lambda: 1.0)
    residual_multiplier: float = field(default_factory=lambda: 1.0)
    attention_multiplier: float | None = field(default_factory=lambda: None)
    logits_scaling: float = field(default_factory=lambda: 1.0)
    no_rope_layers: tuple[int, ...] | None = field(default_factory=lambda: None)
    layer_types: tuple[str, ...] | None = field(default_factory=lambda: None)
    rope_local: dict[str, Any] | None = field(default_factory=lambda: None)
    num_experts: int | None = field(default_factory=lambda: None)
    num_experts_per_tok: int | None = field(default_factory=lambda: None)
    moe_intermediate_size: int | None = field(default_factory=lambda: None)
    norm_topk_prob: bool = field(default_factory=lambda: True)
    mlp_layer_types: tuple[str, ...] | None = field(default_factory=lambda: None)
    num_shared_experts: int | None = field(default_factory=lambda: None)
    routed_scaling_factor: float = field(default_factory=lambda: 1.0)
    use_qk_norm: bool = field(default_factory=lambda: False)
    swiglu_alpha: float | None = field(default_factory=lambda: None)
    swiglu_limit: float | None = field(default_factory=lambda: None)

    @property
    def has_output_bias(self) -> bool:
        """Whether o_proj has a bias."""
        return self.attention_bias and self.architecture not in _OUTPUT_HAS_NO_BIAS

    @property
    def has_sinks(self) -> bool:
        """Whether each head of attention may attend to nothing, by a number of its own."""
        return self.architecture == "GptOssForCausalLM"

    @property
    def has_expert_biases(self) -> bool:
        """Whether routers and experts have biases."""
        return self.architecture == "GptOssForCausalLM"

    @property
    def has_qk_norm(self) -> bool:
        """Whether every head of q and of k is normalised before it is rotated."""
        return self.use_qk_norm or self.architecture in _QK_NORM

    @property
    def has_post_norms(self) -> bool:
        """Whether what attention and MLP add to the residual stream is normalised before."""
        return self.architecture in ("Gemma3ForCausalLM", "Glm4ForCausalLM")

    @property
    def sigmoid_scoring(self) -> bool:
        """Whether a router's score of an expert is a logistic function of its own logit, and not a softmax of all."""
        return self.architecture == "Glm4MoeForCausalLM"

    @property
    def has_correction_bias(self) -> bool:
        """Whether experts are chosen by scores to which numbers of the model are added."""
        return self.architecture in ("Glm4MoeForCausalLM", "Ernie4_5_MoeForCausalLM")

    @property
    def num_all_experts(self) -> int:
        """The MLPs of a sparse layer, those that all tokens share among them; 0: no layer is sparse."""
        return (self.num_experts or 0) + (self.num_shared_experts or 0)

    @property
    def num_all_experts_per_tok(self) -> int:
        """How many of them a token goes through."""
        return (self.num_experts_per_tok or 0) + (self.num_shared_experts or 0)

    @property
    def activation(self) -> str:
        """What the gate of an MLP goes through, as Hugging Face names it: "silu" or "gelu_pytorch_tanh"."""
        return "gelu_pytorch_tanh" if self.architecture == "Gemma3ForCausalLM" else "silu"

    @property
    def has_dense_layers(self) -> bool:
        """Whether some layer has one MLP for all tokens."""
        return self.num_experts is None or "dense" in (self.mlp_layer_types or ())

    def is_sparse(self, layer: int) -> bool:
        """Whether a layer has experts in place of one MLP."""
        return self.num_experts is not None and (
            self.mlp_layer_types is None or self.mlp_layer_types[layer] == "sparse"
        )

    def window_of(self, layer: int) -> int | None:
        """Return how many positions a token sees at most in a layer, its own among them; None: all."""
        return self.sliding_window if self.slides(layer) else None

    def slides(self, layer: int) -> bool:
        """Whether a layer's attention is of the kind that has a window, if there is one."""
        return self.layer_types is None or self.layer_types[layer] == "sliding_attention"

    def rotates(self, layer: int) -> bool:
        """Whether q and k of a layer are rotated by their positions."""
        return self.no_rope_layers is None or bool(self.no_rope_layers[layer])
