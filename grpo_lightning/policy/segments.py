"""Segmented attention inside a model of transformers, through its attention interface."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from grpo_lightning.functional.segments import Segments, Span, Tree, segmented_attention

NAME = "grpo_segments"


class SegmentedModel:
    """Runs a model over a flat row whose tokens see what `Segments` says.

    Outside of such a forward the model has the attention that it came with. The switch hangs on the attention modules,
    not around the forward: gradient checkpointing runs them once more in the backward pass.

    On CUDA this is the same formulation with torch's fused attention; it has not run there yet.

    Args:
        model: Its decoder layers hand their keyword arguments on to the attention interface, as those of Llama, Qwen,
            Gemma and GPT-2 do. `is_exact` tells whether they do.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        # Never compiled: each micro-batch has spans of its own.
        AttentionInterface.register(NAME, torch.compiler.disable(_attention))
        self._model = model
        for module in model.modules():
            if getattr(module, "is_causal", False) and hasattr(module, "layer_idx"):
                switch = _Switch()
                module.register_forward_pre_hook(switch.on, with_kwargs=True)
                module.register_forward_hook(switch.off, always_call=True)

    def arguments(self, position_ids: Tensor, segments: Segments) -> dict[str, Any]:
        """What a forward over a flat row takes besides its tokens."""
        # A mask of four dimensions is one that transformers hands on instead of making its own, of all pairs.
        return {
            "position_ids": position_ids,
            "segments": segments,
            "attention_mask": position_ids.new_zeros(1, 1, 1, 1),
        }

    @torch.no_grad()
    def is_exact(self) -> bool:
        """Whether the model gives two completions of one prompt the states that it gives them one by one.

        Asking the model is safer than a list of names. Whatever goes wrong in the attempt means no.
        """
        device = next(self._model.parameters()).device
        try:
            _check_layers(self._model.config.get_text_config())
            input_ids = torch.tensor([[0, 1, 2, 1, 2, 1, 0]], device=device)  # 0 1 2 | 1 2 | 1 0
            trees = [Tree(Span(0, 3), (Span(3, 2), Span(5, 2)))]
            position_ids = torch.tensor([[0, 1, 2, 3, 4, 3, 4]], device=device)
            arguments = self.arguments(position_ids, Segments.of(trees, device))
            decoder = self._model.base_model
            flat = decoder(input_ids=input_ids, use_cache=False, **arguments).last_hidden_state[0]
            one_by_one = torch.tensor([[0, 1, 2, 1, 2], [0, 1, 2, 1, 0]], device=device)
            states = decoder(input_ids=one_by_one, use_cache=False).last_hidden_state
        except Exception:
            return False
        expected = torch.cat((states[0], states[1, 3:]))
        # Half precision rounds to 2^-8; a model that ignores the segments is off by the size of the states.
        tolerance = 0.05 if flat.dtype.itemsize == 2 else 1e-3
        return bool((flat - expected).norm() <= tolerance * expected.norm())


class _Switch:
    """Gives an attention module our attention while it is called with segments."""

    def __init__(self) -> None:
        self._before: str | None = None

    def on(self, module: nn.Module, _: Any, kwargs: dict[str, Any]) -> None:
        """Before the module's forward. Another policy of the same model may have switched already."""
        config: Any = module.config
        if kwargs.get("segments") is not None and config._attn_implementation != NAME:
            self._before, config._attn_implementation = config._attn_implementation, NAME

    def off(self, module: nn.Module, *_: Any) -> None:
        """After it, whether or not it raised."""
        if self._before is not None:
            config: Any = module.config
            config._attn_implementation, self._before = self._before, None


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _: Tensor | None,
    *,
    segments: Segments,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer: [1, heads, N, width] to [1, N, heads, width]."""
    unknown = [name for name in ("position_bias", "s_aux", "sinks") if others.get(name) is not None]
    layer_types = getattr(module.config, "layer_types", None)
    is_sliding = layer_types is not None and layer_types[module.layer_idx] == "sliding_attention"
    if unknown or (is_sliding and sliding_window is None):
        raise NotImplementedError(f"segmented attention with {', '.join(unknown) or 'an unknown window'}")
    output = segmented_attention(query, key, value, segments, scale=scaling, window=sliding_window, softcap=softcap)
    return output, None


def _check_layers(config: PreTrainedConfig) -> None:
    """What a few tokens do not show."""
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds - {"full_attention", "sliding_attention"} or getattr(config, "attention_chunk_size", None) is not None:
        raise NotImplementedError(f"layers of {sorted(kinds)}")
