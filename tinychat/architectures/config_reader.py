"""ConfigReader: reads config.json strictly. Every key is read, harmless by name, or refused; every value is checked.

It knows the keys that all families share and both spellings of rotary parameters and dtype; a family's file says which
of them it has, and with which defaults.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from tinychat.config import Activation, Experts, ModelConfig, Rope, RopeScaling
from tinychat.errors import ConfigError

REQUIRED: Any = object()  # the default of a key that has none

# Keys that do not change what the network computes: bookkeeping, training, generation (read elsewhere), and code hooks,
# which are never followed.
_BOOKKEEPING = """
    _attn_implementation _attn_implementation_autoset _attn_implementation_internal _commit_hash
    _flash_attn_2_enabled _from_model_config _name_or_path activation_dropout architectures attention_dropout
    attention_probs_dropout_prob attn_implementation attn_pdrop auto_map bad_words_ids begin_suppress_tokens
    bos_token_id chunk_size_feed_forward classifier_dropout cls_token_id decoder_start_token_id diversity_penalty
    do_sample dropout early_stopping emb_pdrop embd_pdrop embedding_dropout embedding_fraction
    encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id gradient_checkpointing hidden_dropout hidden_dropout_prob id2label init_config init_device
    init_std initializer_range is_decoder is_llama_config label2id layerdrop length_penalty max_length
    max_new_tokens max_sequence_length min_length model_max_length model_name no_repeat_ngram_size num_beam_groups
    num_beams num_logits_to_keep num_return_sequences output_attentions output_hidden_states
    output_router_logits output_scores pad_token_id prefix pretraining_tp problem_type quantization_config
    remove_invalid_values repetition_penalty resid_pdrop residual_dropout return_dict return_dict_in_generate
    router_aux_loss_coef router_jitter_noise sep_token_id seq_length suppress_tokens
    task_specific_params temperature tf_legacy_loss tokenizer_class tokenizer_name top_k top_p torchscript
    transformers.js_config transformers_version trust_remote_code typical_p unsloth_fixed unsloth_version
    use_bfloat16 use_cache verbose
"""
HARMLESS = frozenset(_BOOKKEEPING.split())
# Keys that are harmless at one value only: the one that switches off what is not implemented.
HARMLESS_AT: dict[str, Any] = {
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "partial_rotary_factor": 1.0,
    "pruned_heads": {},
    "rope_interleaved": False,
    "tie_encoder_decoder": False,
    "use_mrope": False,
}
LARGEST_POSITION = 2**27
ACTIVATIONS = {
    "silu": Activation.SILU,
    "swish": Activation.SILU,
    "gelu": Activation.GELU,
    "gelu_new": Activation.GELU_TANH,
    "gelu_fast": Activation.GELU_TANH,
    "gelu_pytorch_tanh": Activation.GELU_TANH,
    "relu": Activation.RELU,
}
DTYPES = ("float16", "bfloat16", "float32")


class ConfigReader:
    """A mapping of config.json that remembers what was read. `path` is what its keys are called in messages."""

    def __init__(
        self, values: Mapping[str, Any], ignore: Collection[str] = (), path: str = "", bookkeeping: bool = True
    ):
        """`bookkeeping`: whether the object may have the keys of a whole config."""
        if not isinstance(values, Mapping):
            raise ConfigError(f"config.json: {path.rstrip('.') or 'the file'} is not an object but {_show(values)}")
        self._ignore = ignore
        self._path = path
        self._bookkeeping = bookkeeping
        self._values = {key: value for key, value in values.items() if path + key not in ignore}
        self._read: set[str] = set()
        self._spellings: dict[str, str] = {}

    def error(self, key: str, expected: str) -> ConfigError:
        """The error for a value that is not what was `expected`."""
        if key not in self._values and self._spellings.get(key) in self._values:
            key = self._spellings[key]
        found = _show(self._values[key]) if key in self._values else "nothing"
        return ConfigError(f"config.json: {self._path}{key} is {found}; expected {expected}")

    def get(self, key: str, default: Any = REQUIRED) -> Any:
        """The value of `key`, marked as read; null and absent are the default."""
        key = self._found(key)
        value = self._values.get(key)
        if value is None:
            if default is REQUIRED:
                raise self.error(key, "a value: the key is required")
            return default
        return value

    def _found(self, key: str) -> str:
        """`key`, or the other spelling where that is in the file; both are read, and must not differ."""
        other = self._spellings.get(key)
        self._read |= {key, other or key}
        if other is None or other not in self._values:
            return key
        if self._values.get(key) not in (None, self._values[other]):
            raise self.error(other, f"the same as {key} = {_show(self._values[key])}")
        return other

    def integer(self, key: str, default: Any = REQUIRED, *, low: int = 1, high: int) -> Any:
        """An int in low..high, or `default`."""
        value = self.get(key, default)
        if value is default:
            return value
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.error(key, f"an integer from {low} to {high}")
        return value

    def number(self, key: str, default: Any = REQUIRED, *, above: float, high: float) -> Any:
        """A float in (above, high], or `default`."""
        value = self.get(key, default)
        if value is default:
            return value
        if isinstance(value, bool) or not isinstance(value, int | float) or not above < value <= high:
            raise self.error(key, f"a number above {above:g} and up to {high:g}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """A bool."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def text(self, key: str, default: Any = REQUIRED, *, choices: Collection[str] = ()) -> Any:
        """A string, one of `choices` if there are any, or `default`."""
        value = self.get(key, default)
        if value is default:
            return value
        if not isinstance(value, str) or (choices and value not in choices):
            raise self.error(key, f"one of {', '.join(choices)}" if choices else "a string")
        return value

    def finish(self) -> None:
        """Refuse what was not read and is not harmless; every such key is named. Null is as good as absent."""
        given = [key for key, value in self._values.items() if value is not None]
        unknown = sorted(key for key in given if key not in self._read and not self._harmless(key))
        if not unknown:
            return
        found = ", ".join(f"{self._path}{key} = {_show(self._values[key])}" for key in unknown)
        passing = " ".join(f"--ignore-config {self._path}{key}" for key in unknown)
        raise ConfigError(
            f"config.json has what is not implemented: {found}; implemented for this model are "
            f"{', '.join(sorted(self._read))}; to run the model as if it were not there: {passing}"
        )

    def _harmless(self, key: str) -> bool:
        switched_off = key in HARMLESS_AT and self._values[key] == HARMLESS_AT[key]
        return switched_off or (key in HARMLESS and self._bookkeeping)

    def spelled(self, **keys: str) -> ConfigReader:
        """Itself; where a key is absent, the family's own name for it is looked for."""
        self._spellings |= keys
        return self

    def decoder(
        self,
        *,
        n_kv_heads: int | None = None,
        head_dim: int | None = None,
        hidden_act: str = "silu",
        norm_eps: float = 1e-6,
        tied: bool = False,
        partial: float | None = None,
        theta: float = 10000.0,
        biases: Collection[str] = (),
        window: tuple[int | None, frozenset[int]] = (None, frozenset()),
        **fields: Any,
    ) -> ModelConfig:
        """The keys that families share. The family's defaults of them are arguments (None: derived); fields of
        `ModelConfig` that are given are not looked for."""

        def field(name: str, read: Callable[[], Any]) -> Any:
            return fields.pop(name) if name in fields else read()

        hidden_size = self.integer("hidden_size", high=2**17)
        n_heads = self.integer("num_attention_heads", high=2**10)
        if "num_key_value_heads" in self._values or n_kv_heads is None:
            n_kv_heads = n_heads  # what null means in every family
        n_kv_heads = self.integer("num_key_value_heads", n_kv_heads, high=2**10)
        if n_heads % n_kv_heads:
            raise self.error("num_attention_heads", f"a multiple of num_key_value_heads = {n_kv_heads}")
        head_dim = self.integer("head_dim", head_dim, low=4, high=2**10)
        if head_dim is None:
            if hidden_size % n_heads:
                raise self.error("hidden_size", f"a multiple of num_attention_heads = {n_heads}, or head_dim")
            head_dim = hidden_size // n_heads
        max_positions = field("max_positions", lambda: self.integer("max_position_embeddings", high=LARGEST_POSITION))
        return ModelConfig(
            model_type=self.text("model_type"),
            vocab_size=self.integer("vocab_size", high=2**24),
            hidden_size=hidden_size,
            n_layers=self.n_layers(),
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            head_dim=head_dim,
            intermediate_size=field("intermediate_size", lambda: self.integer("intermediate_size", high=2**20)),
            max_positions=max_positions,
            norm_eps=self.number("rms_norm_eps", norm_eps, above=0, high=1),
            rope=field("rope", lambda: self.rope(head_dim, max_positions, partial=partial, theta=theta)),
            activation=field("activation", lambda: self.activation(hidden_act)),
            sliding_window=window[0],
            windowed_layers=window[1],
            biases=frozenset(biases),
            tied_head=self.flag("tie_word_embeddings", tied),
            dtype=self.dtype(),
            **fields,
        )

    def experts(self, *, n_used: int, normalized: bool, shared_size: int = 0) -> Experts:
        """The keys of Qwen's mixtures; `n_used` and `normalized` are the family's defaults."""
        n_layers = self.n_layers()
        spelled = "num_experts" if "num_experts" in self._values else "num_local_experts"  # as transformers 5 writes it
        n_experts = self.integer(spelled, high=2**12)
        dense = self.get("mlp_only_layers", [])
        if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
            raise self.error("mlp_only_layers", "a list of layers")
        step = self.integer("decoder_sparse_step", 1, high=2**10)
        return Experts(
            n_experts,
            self.integer("num_experts_per_tok", n_used, high=n_experts),
            self.integer("moe_intermediate_size", high=2**20),
            frozenset(range(step - 1, n_layers, step)) - frozenset(dense),
            self.flag("norm_topk_prob", normalized),
            shared_size,
        )

    def activation(self, default: str) -> Activation:
        """Of the MLP."""
        return ACTIVATIONS[self.text("hidden_act", default, choices=tuple(ACTIVATIONS))]

    def cap(self, key: str, default: float | None) -> float | None:
        """A bound that scores or logits approach; null, unlike an absent key, is none."""
        if key in self._values and self._values[key] is None:
            default = None
        return self.number(key, default, above=0, high=1e6)

    def pass_over(self, *keys: str) -> None:
        """Keys that are the family's own and change nothing here."""
        for key in keys:
            self.get(key, None)

    def require(self, *switches: str) -> None:
        """Flags that must be true, or absent: what they switch off cannot be left out here."""
        for key in switches:
            if not self.flag(key, True):
                raise self.error(key, "true: what it switches off is not implemented otherwise")

    def refuse(self, *switches: str) -> None:
        """Flags that must be false, or absent: what they switch on is not implemented."""
        for key in switches:
            if self.flag(key, False):
                raise self.error(key, "false: it is not implemented")

    def dtype(self) -> str:
        """Of the unquantized weights."""
        dtype = self.text("dtype", None, choices=DTYPES)
        spelled_before = self.text("torch_dtype", DTYPES[0], choices=DTYPES)
        return dtype or spelled_before

    def nested(self, key: str) -> ConfigReader:
        """A reader of the object at `key`, or of an empty one; to be finished like this one."""
        return ConfigReader(self.get(key, {}), self._ignore, f"{self._path}{key}.")

    def n_layers(self) -> int:
        """Decoder blocks."""
        return self.integer("num_hidden_layers", high=2**10)

    def sliding_window(self, default: int | None) -> int | None:
        """The window, `default` where the key is absent, None where it is null."""
        if "sliding_window" in self._values and self._values["sliding_window"] is None:
            default = None
        return self.integer("sliding_window", default, high=LARGEST_POSITION)

    def windows(self) -> tuple[int | None, frozenset[int]]:
        """(window, layers it applies to), for families that switch it on by `use_sliding_window`: in `layer_types`
        where given, else from layer `max_window_layers` on."""
        window = self.sliding_window(4096) if self.flag("use_sliding_window", False) else None
        self.get("sliding_window", None)
        first = self.integer("max_window_layers", 28, low=0, high=2**20)
        given = self.get("layer_types", None) is not None
        layers = self.sliding_layers(lambda layer: layer >= first)
        if given and layers and window is None:
            raise self.error("layer_types", "full_attention only: use_sliding_window or sliding_window is off")
        return (window, layers) if window is not None and layers else (None, frozenset())

    def every_layer(self, window: int | None) -> tuple[int | None, frozenset[int]]:
        """A window, perhaps none, over all layers."""
        return window, frozenset(range(self.n_layers()) if window else ())

    def sliding_layers(self, default: Callable[[int], bool]) -> frozenset[int]:
        """The layers that `layer_types` gives a window; where it is absent, those that `default` does."""
        n_layers, kinds = self.n_layers(), self.get("layer_types", None)
        if kinds is None:
            return frozenset(filter(default, range(n_layers)))
        known = ("full_attention", "sliding_attention")
        if not isinstance(kinds, list) or len(kinds) != n_layers or not all(kind in known for kind in kinds):
            raise self.error("layer_types", f"{n_layers} times full_attention or sliding_attention")
        return frozenset(layer for layer, kind in enumerate(kinds) if kind == "sliding_attention")

    def rope(self, head_dim: int, max_positions: int, *, partial: float | None = None, theta: float = 10000.0) -> Rope:
        """Rotary parameters in either spelling: `rope_theta` and `rope_scaling`, or all in `rope_parameters`.

        partial: the default of partial_rotary_factor, the share of a head that turns; None: all of it always does.
        """
        theta = self.number("rope_theta", theta, above=1, high=1e15)
        if partial is not None:
            partial = self.number("partial_rotary_factor", partial, above=0, high=1)
        spellings = [key for key in ("rope_scaling", "rope_parameters") if self.get(key, None)]
        found = []
        for key in spellings or ["rope_parameters"]:
            inner = ConfigReader(self.get(key, {}), self._ignore, f"{self._path}{key}.", bookkeeping=False)
            found.append(inner._rope(self, theta, head_dim, partial, max_positions))
            inner.finish()
        if found[0] != found[-1]:
            raise self.error("rope_scaling", f"the same as rope_parameters = {_show(self.get('rope_parameters'))}")
        return found[0]

    def two_ropes(self, head_dim: int, *, theta: float, local_theta: float) -> tuple[Rope, Rope]:
        """(that of layers that see everything, that of layers with a window): objects of `rope_parameters`, or the
        keys of one rope and rope_local_base_freq."""
        max_positions = self.integer("max_position_embeddings", high=LARGEST_POSITION)
        kinds = self.get("rope_parameters", {})
        if not isinstance(kinds, dict) or "full_attention" not in kinds:
            local = Rope(self.number("rope_local_base_freq", local_theta, above=1, high=1e15), head_dim)
            return self.rope(head_dim, max_positions, theta=theta), local
        both = ConfigReader(kinds, self._ignore, f"{self._path}rope_parameters.", bookkeeping=False)
        found = []
        for key, base in (("full_attention", theta), ("sliding_attention", local_theta)):
            inner = ConfigReader(both.get(key, {}), self._ignore, f"{both._path}{key}.", bookkeeping=False)
            found.append(inner._rope(self, base, head_dim, None, max_positions))
            inner.finish()
        both.finish()
        return found[0], found[1]

    def _rope(
        self, outer: ConfigReader, theta: float, head_dim: int, partial: float | None, max_positions: int
    ) -> Rope:
        supported = {scaling.value: scaling for scaling in RopeScaling} | {"su": RopeScaling.LONGROPE}
        older = self.text("type", "default", choices=supported)
        scaling = supported[self.text("rope_type", older, choices=supported)]
        theta = self.number("rope_theta", theta, above=1, high=1e15)
        if partial is not None:
            partial = self.number("partial_rotary_factor", partial, above=0, high=1)
        dim = head_dim if partial is None else int(head_dim * partial)
        if dim % 2:
            raise ConfigError(f"config.json: of heads {dim} dimensions turn; rotary positions need an even number")
        if scaling is RopeScaling.NONE:
            return Rope(theta, dim)
        # null: the ratio of the two contexts
        derived = scaling is RopeScaling.LONGROPE or (scaling is RopeScaling.YARN and "factor" in self._values)
        factor = self.number("factor", None if derived else REQUIRED, above=0, high=1e6)
        if scaling is RopeScaling.LINEAR:
            return Rope(theta, dim, scaling, factor)
        if scaling is RopeScaling.DYNAMIC:
            return Rope(theta, dim, scaling, factor, max_positions)
        original = self.integer("original_max_position_embeddings", max_positions, high=LARGEST_POSITION)
        original = outer.integer("original_max_position_embeddings", original, high=LARGEST_POSITION)
        if scaling is RopeScaling.LLAMA3:
            low = self.number("low_freq_factor", above=0, high=1e6)
            high = self.number("high_freq_factor", above=0, high=1e6)
            if high <= low:
                raise self.error("high_freq_factor", f"a number above low_freq_factor = {low:g}")
            return Rope(theta, dim, scaling, factor, original, low_freq_factor=low, high_freq_factor=high)
        if factor is None:
            factor = max_positions / original
        attention_factor = self.number("attention_factor", None, above=0, high=1e3)
        if scaling is RopeScaling.LONGROPE:
            short, long = (self._factors(key, dim // 2) for key in ("short_factor", "long_factor"))
            stretched = Rope(theta, dim, scaling, factor, original, attention_factor=attention_factor)
            return replace(stretched, short_factors=short, long_factors=long)
        fast = self.number("beta_fast", 32.0, above=0, high=1e6)
        slow = self.number("beta_slow", 1.0, above=0, high=1e6)
        if fast < slow:
            raise self.error("beta_fast", f"at least beta_slow = {slow:g}")
        return Rope(
            theta,
            dim,
            scaling,
            factor,
            original,
            beta_fast=fast,
            beta_slow=slow,
            mscale=self.number("mscale", 0.0, above=-1e-9, high=1e3),
            mscale_all_dim=self.number("mscale_all_dim", 0.0, above=-1e-9, high=1e3),
            attention_factor=attention_factor,
            truncate=self.flag("truncate", True),
        )

    def _factors(self, key: str, n: int) -> tuple[float, ...]:
        factors = self.get(key)
        numbers = isinstance(factors, list) and all(type(x) in (int, float) and 0 < x <= 1e6 for x in factors)
        if not numbers or len(factors) != n:
            raise self.error(key, f"{n} positive numbers")
        return tuple(map(float, factors))


def _show(value: Any) -> str:
    """A value for a message, on one line and of a bearable length."""
    if isinstance(value, float) and math.isnan(value):
        return "NaN"
    shown = repr(value) if not isinstance(value, bool | None) else {True: "true", False: "false", None: "null"}[value]
    return shown if len(shown) <= 80 else shown[:77] + "..."
