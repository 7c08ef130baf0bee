"""TensorNames: how a family's checkpoint names the tensors that `weights.py` knows by their canonical names."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class TensorNames:
    """Module names of a checkpoint, without `.weight` or `.bias`; per-layer ones follow `layer` with `{}` its index.

    A tuple lists the segments that are fused into one canonical linear, in order.
    """

    embed: str = "model.embed_tokens"
    norm: str = "model.norm"
    head: str = "lm_head"
    positions: str = ""  # learned
    embed_norm: str = ""
    project_in: str = ""
    project_out: str = ""
    layer: str = "model.layers.{}."
    norm1: str = "input_layernorm"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    out: tuple[str, ...] = ("self_attn.o_proj",)
    norm2: str = "post_attention_layernorm"
    out_norm: str = ""
    down_norm: str = ""
    up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: tuple[str, ...] = ("mlp.down_proj",)
    router: tuple[str, ...] = ("mlp.gate", "mlp.shared_expert_gate")  # the second where there is a shared expert
    shared_up: tuple[str, ...] = ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj")
    shared_down: tuple[str, ...] = ("mlp.shared_expert.down_proj",)
    expert_up: tuple[str, ...] = ("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj")  # {}: the expert's index
    expert_down: tuple[str, ...] = ("mlp.experts.{}.down_proj",)
    act_scale: str = ""  # AWQ's, in families for which it has one: a tensor, not a module
    heads_interleaved: bool = False  # rows of a fused qkv: for each key-value head its queries, its key, its value
    norm_offset: float = 0.0  # a stored weight w of a norm stands for norm_offset + w
    ignored: tuple[str, ...] = (".rotary_emb.inv_freq",)  # endings of tensors that carry nothing

    def renamed(self, **names: str) -> TensorNames:
        """With other names for some modules."""
        return replace(self, **names)  # type: ignore[arg-type]

    def as_stored(self, present: Collection[str]) -> TensorNames:
        """For files of the bare model, whose names lack the first component that all but the head's have here."""
        base = self.embed.partition(".")[0] + "."
        fields = ("embed", "norm", "layer", "positions", "embed_norm", "project_in", "project_out")
        bare = self.renamed(**{name: getattr(self, name).removeprefix(base) for name in fields})
        found = f"{self.embed}.weight" in present or f"{bare.embed}.weight" not in present
        return self if found else bare

    def vector(self, name: str, layer: int) -> str:
        """The tensor of one of `weights.NORMS` in block `layer`, or that of `act_scale`."""
        if name == "act_scale":
            return self.layer.format(layer) + self.act_scale
        norm, bias, _ = name.partition("_bias")
        return f"{self.layer.format(layer)}{getattr(self, norm)}.{'bias' if bias else 'weight'}"
