# Copyright 2026 The peft_sdpt authors
# SPDX-License-Identifier: Apache-2.0
"""Computes the outputs of `attention.bi_attention` in less time and memory, without its attention weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from .attention import (
    MaskFunction,
    Side,
    SideInput,
    append_prompts,
    hide_padding,
    mask_logits,
    read_gated,
    softmax_by_group,
    split_heads,
)
from .inverse import without_autocast


def absorbing_pays(image_length: int, text_length: int, weight: torch.Tensor, num_heads: int) -> bool:
    """Return whether `fused_bi_attention` needs fewer multiplications than `bi_attention`.

    It does not with a long text and a small image.

    Args:
        image_length, text_length: Number of tokens and prompts of each modality.
        weight: Weight of a projection of image tokens, `(E, dv)`.
        num_heads: Number of heads of the attention.
    """
    width, dim = weight.shape
    absorbed = 3 * image_length * text_length * dim * num_heads + 5 * text_length * width * dim
    projected = 3 * image_length * text_length * width + 3 * (image_length + text_length) * width * dim
    return absorbed < projected


def fused_bi_attention(
    image: SideInput,
    text: SideInput,
    image_side: Side,
    text_side: Side,
    *,
    num_heads: int,
    scale: float,
    dropout: float = 0.0,
    image_mask_function: MaskFunction = hide_padding,
    text_mask_function: MaskFunction = hide_padding,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the outputs of `bi_attention` without its weights, and without projecting an image token.

    Attention is linear in its projections, so the few text tokens absorb the projections of the many image tokens, head
    by head: `(v W_q^T) k^T = v (k W_q)^T` for the logits, `P (t W_o^T)` for what image tokens read, and `(P v) W_v^T`
    for what text tokens read. The remaining products are those of the attention itself, with image tokens as queries,
    keys and values of all heads. A bias of the image's queries shifts all logits of a key. It shifts those of a text
    token by the same number, which a softmax does not depend on.

    No tensor of the size of the logits is stored for the backward pass, except dropout masks of one byte per weight.
    Compiled code may store logits, because the compiler sees that the backward pass computes them again.

    Where `_kernels_pay`, the two directions are two calls of `torch.nn.functional.scaled_dot_product_attention`.
    Otherwise, and with dropout, they share their logits in `_BothDirections`.

    Gated prompts of the text are further keys and values of the image, with a softmax of their own. The gate is a
    factor of their values. Text tokens read gated prompts of the image apart, because both are few.

    Args:
        image, text, num_heads, scale, dropout, image_mask_function, text_mask_function: See `bi_attention`. A mask
            function may only add to the logits.
        image_side: Projections of the image. They are plain linear layers, whose weights are used without calling them.
        text_side: Projections of the text.

    Returns:
        `(image_out, text_out)`, each `(B, L, d)`. They can be differentiated once. `bi_attention` can be differentiated
        any number of times.
    """
    text_tokens = text.tokens if text.prompts is None else append_prompts(text.tokens, text.prompts)
    text_length = text.tokens.shape[1]

    # Sizes of the groups of keys of the image. Each has a softmax of its own.
    sizes = [text_tokens.shape[1]]
    if text.gated is not None:
        text_tokens = append_prompts(text_tokens, text.gated.tokens)
        sizes += text.gated.sizes

    keys = split_heads(text_side.query(text_tokens) * scale, num_heads)
    values = split_heads(text_side.value(text_tokens), num_heads)
    if text.gated is not None:
        ungated, of_prompts = values.split([sizes[0], sum(sizes[1:])], dim=2)
        values = torch.cat([ungated, of_prompts * text.gated.gate_of_prompts.to(values.dtype)], dim=2)
    query_weight = image_side.query.weight.unflatten(0, (num_heads, -1))  # (heads, head_dim, dv)
    out_weight = image_side.out.weight.unflatten(1, (num_heads, -1)).permute(1, 2, 0)  # (heads, head_dim, dv)
    keys_of_image = keys @ query_weight  # (B, heads, K, dv)
    values_of_image = values @ out_weight  # (B, heads, K, dv)
    # Under autocast, the kernels would cast the many image tokens once for each use and each head.
    dtype = keys_of_image.dtype
    image_tokens = image.tokens.to(dtype)
    text_bias = _added(text, text_mask_function, dtype)  # of each key of the image: (B, heads or 1, 1, K)
    if text_bias is not None:
        text_bias = F.pad(text_bias, (0, sum(sizes[1:])))
    if image_side.query.bias is not None:
        shift = keys @ image_side.query.bias.view(num_heads, -1, 1)
        text_bias = shift.mT if text_bias is None else shift.mT + text_bias
    image_bias = _added(image, image_mask_function, dtype)  # of each key of the text: (B, 1, 1, M)

    if dropout == 0.0 and _kernels_pay(image_tokens, image.prompts, keys_of_image, values_of_image):
        keys_of_text = image_tokens if image.prompts is None else append_prompts(image_tokens, image.prompts)
        length = sizes[0]
        bias, bias_of_gated = (None, None) if text_bias is None else (text_bias[..., :length], text_bias[..., length:])
        image_out = F.scaled_dot_product_attention(
            image_tokens[:, None].expand(-1, num_heads, -1, -1),
            keys_of_image[:, :, :length],
            values_of_image[:, :, :length],
            attn_mask=bias,
            scale=1.0,
        ).sum(1)
        if text.gated is not None:
            image_out = image_out + _read_few(
                image_tokens, keys_of_image[:, :, length:], values_of_image[:, :, length:], bias_of_gated, sizes[1:]
            )
        read = F.scaled_dot_product_attention(
            keys_of_image[:, :, :text_length].flatten(1, 2)[:, None],
            keys_of_text[:, None],
            keys_of_text[:, None],
            attn_mask=image_bias,
            scale=1.0,
        )[:, 0]
        total = None
    else:
        prompts = image_tokens.new_empty(0, image_tokens.shape[-1]) if image.prompts is None else image.prompts
        image_out, read, total = _BothDirections.apply(
            image_tokens,
            prompts.to(dtype).expand(image_tokens.shape[0], -1, -1),
            keys_of_image,
            values_of_image,
            text_bias,
            image_bias,
            text_length,
            sizes,
            dropout,
        )
    if image_side.out.bias is not None:
        image_out = image_out + image_side.out.bias.to(image_out.dtype)

    value_weight = image_side.value.weight.unflatten(0, (num_heads, -1))
    text_out = read.unflatten(1, (num_heads, text_length)) @ value_weight.mT  # (B, heads, Nl, head_dim)
    if image_side.value.bias is not None:
        bias = image_side.value.bias.view(num_heads, 1, -1)
        text_out = text_out + (bias if total is None else total * bias)
    if image.gated is not None:
        read, _ = read_gated(keys[:, :, :text_length], image.gated, image_side.query, image_side.value, dropout=dropout)
        text_out = text_out + read
    return image_out, text_side.out(text_out.transpose(1, 2).flatten(2))


def _added(side: SideInput, mask_function: MaskFunction, dtype: torch.dtype) -> torch.Tensor | None:
    """Return what the masks of a side and its prompts add to logits of a dtype, `(B, 1, 1, L + N)`, or None."""
    if side.mask is None and side.prompt_mask is None:
        return None
    nothing = side.tokens.new_zeros(side.tokens.shape[0], 1, 1, side.length)
    return mask_logits(nothing, side, mask_function).to(dtype)


def _read_few(
    tokens: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor | None,
    sizes: Sequence[int],
) -> torch.Tensor:
    """Return what tokens `(B, M, d)` read from a few keys and values `(B, heads, N, d)` of all heads, `(B, M, d)`.

    Two products for all heads at once are faster here than the kernels, which repeat the tokens for each head.
    """
    logits = (tokens @ keys.flatten(1, 2).mT).unflatten(-1, (keys.shape[1], -1))
    if bias is not None:
        logits = logits + bias.transpose(1, 2)
    return softmax_by_group(logits, sizes).flatten(2) @ values.flatten(1, 2)


def _kernels_pay(image: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Return whether to call `scaled_dot_product_attention`.

    It takes four products of the size of the logits where three are enough. Its backward pass is slow with as few keys
    as a text has, and stores the logits if the mask needs gradients. Without gradients, its kernels are faster in half
    precision, and they take less memory in code that is compiled or exported, which has no chunks. The page
    "Performance" of the documentation has the measurements.

    Args:
        image: Image tokens.
        others: Other inputs of the attention.
    """
    if torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in (image, *others)):
        return False
    return image.dtype in (torch.float16, torch.bfloat16) or torch.compiler.is_compiling()


def _on_cpu(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu"


# Number of logits that are computed at a time, for all samples and heads.
#
# On a CPU, 2 MiB in single precision fit the cache of a core. With 800 x 1333 pixels and 256 tokens on an AMD EPYC,
# forward and backward take 1.05 times as long with four times as many, and 1.4 times as long with all at once.
_LOGITS_AT_A_TIME = 2**19
# On a GPU, kernels must be large: with chunks of the CPU's size, most of the time is spent on launching them. 64 MiB in
# single precision take longer to read than a kernel to launch, and bound the memory of large batches.
_LOGITS_AT_A_TIME_ON_GPU = 2**24


class _Shared:
    """The tensors that all chunks of `_BothDirections` share.

    Attributes:
        keys, values: `(B, heads * K, d)`.
        dtype: The dtype of products: that of the inputs. Products in float16 are not faster on a CPU, so they are in
            single precision there.
        exact: The dtype of softmaxes and sums, at least single precision.
    """

    def __init__(
        self,
        image: torch.Tensor,
        prompts: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        text_bias: torch.Tensor | None,
        image_bias: torch.Tensor | None,
        text_length: int,
        sizes: Sequence[int],
    ) -> None:
        on_cpu = _on_cpu(image)
        self.exact = torch.promote_types(image.dtype, torch.float32)
        self.dtype = self.exact if on_cpu and image.dtype == torch.float16 else image.dtype
        self.keys, self.values = keys.to(self.dtype).flatten(1, 2), values.to(self.dtype).flatten(1, 2)
        self.num_heads, self.text_length, self.sizes = keys.shape[1], text_length, sizes
        self.text_bias = None if text_bias is None else text_bias.to(self.exact).transpose(1, 2)
        self.image_bias = None if image_bias is None else image_bias.to(self.exact).permute(0, 3, 1, 2)
        self.tokens = [(0, image)]
        if prompts.shape[1]:
            self.tokens.append((image.shape[1], prompts))
        self.logits_at_a_time = _LOGITS_AT_A_TIME if on_cpu else _LOGITS_AT_A_TIME_ON_GPU

    def chunks(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Yield begin, end and tokens `(B, n, d)` of each chunk. Prompts come last, in chunks of their own.

        Compiled code takes all at once, so that one graph is enough for all image sizes.
        """
        if torch.compiler.is_compiling():
            for start, tokens in self.tokens:
                yield start, start + tokens.shape[1], tokens.to(self.dtype)
            return
        size = max(1, self.logits_at_a_time // max(1, self.keys[..., 0].numel()))
        for start, tokens in self.tokens:
            for begin in range(0, tokens.shape[1], size):
                chunk = tokens[:, begin : begin + size]
                yield start + begin, start + begin + chunk.shape[1], chunk.to(self.dtype)

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return logits `(B, n, heads, K)`, before the masks and the bias of the image's queries are added."""
        return (tokens @ self.keys.mT).unflatten(-1, (self.num_heads, -1))

    def image_weights(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the weights of the image direction, `(B, n, heads, K)`."""
        logits = logits.to(self.exact) if self.text_bias is None else logits + self.text_bias
        return softmax_by_group(logits, self.sizes)

    def grad_of_image_logits(self, grad_weights: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Turn the gradient of the weights of the image direction into that of the logits, in place."""
        for grad, group in zip(grad_weights.split(self.sizes, dim=-1), weights.split(self.sizes, dim=-1), strict=True):
            grad.sub_((grad * group).sum(-1, keepdim=True)).mul_(group)
        return grad_weights

    def text_logits(self, logits: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        """Return the logits of the text direction, `(B, n, heads, T)`."""
        logits = logits[..., : self.text_length].to(self.exact)
        return logits if self.image_bias is None else logits + self.image_bias[:, begin:end]


def _keep(weights: torch.Tensor, dropout: float) -> torch.Tensor | None:
    """Return a random mask, bool, of the weights that dropout keeps. None without dropout."""
    return torch.empty_like(weights, dtype=torch.bool).bernoulli_(1 - dropout) if dropout else None


def _drop(weights: torch.Tensor, keep: torch.Tensor | None, dropout: float) -> torch.Tensor:
    return weights if keep is None else weights * keep * (1 / (1 - dropout) if dropout < 1 else 0)


def _add_product(total: torch.Tensor, one: torch.Tensor, other: torch.Tensor) -> None:
    """Add a product of batches of matrices to `total`, which may have a wider dtype."""
    if total.dtype == one.dtype:
        total.baddbmm_(one, other)
    else:
        total += one @ other


class _BothDirections(torch.autograd.Function):
    """Both directions of the attention in chunks of image tokens, with the logits of a chunk computed once for both.

    The softmax of a text token over all image tokens is an online softmax (arXiv 1805.02867), with a running maximum
    and a running sum. The backward computes the logits again (arXiv 2205.14135). It needs the inputs, the values that
    the text tokens read, and, with dropout, the mask of the weights.

    Shapes: `image (B, M, d)`, `prompts (B, N, d)` that only text tokens see, `keys` and `values (B, heads, K, d)` of
    which the first `T = text_length` are text tokens, `text_bias (B, heads or 1, 1, K)`, `image_bias (B, 1, 1, M + N)`.
    `sizes` are those of the groups of the K keys; an image token takes a softmax over each.
    Returns `(B, M, d)`, `(B, heads * T, d)` and, with dropout, the sums of the text's weights `(B, heads, T, 1)`,
    which are not 1 then. Without dropout, the last is None.
    """

    @staticmethod
    def forward(
        ctx: Any,
        image: torch.Tensor,
        prompts: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        text_bias: torch.Tensor | None,
        image_bias: torch.Tensor | None,
        text_length: int,
        sizes: Sequence[int],
        dropout: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        with without_autocast(image.device.type):
            shared = _Shared(image, prompts, keys, values, text_bias, image_bias, text_length, sizes)
            kept = []
            image_out = torch.empty_like(image, dtype=keys.dtype)
            # State of the text's softmax over the image tokens and prompts so far: maximum, sum, and what was read.
            top = shared.keys.new_full((*keys.shape[:2], text_length), -torch.inf, dtype=shared.exact)
            total, dropped_total = torch.zeros_like(top), torch.zeros_like(top)
            read = top.new_zeros(keys.shape[0], keys.shape[1] * text_length, keys.shape[-1])
            for begin, end, tokens in shared.chunks():
                logits = shared.logits(tokens)
                if begin < image.shape[1]:
                    weights = shared.image_weights(logits)
                    kept.append(_keep(weights, dropout))
                    weights = _drop(weights, kept[-1], dropout).flatten(2)
                    image_out[:, begin:end] = weights.to(shared.dtype) @ shared.values
                text_logits = shared.text_logits(logits, begin, end)
                top, top_before = torch.maximum(top, text_logits.amax(1)), top
                # If there was only padding so far, -inf - -inf would be NaN.
                taken_off = top.masked_fill(top == -torch.inf, 0)
                weights = (text_logits - taken_off[:, None]).exp_()
                before = total * (top_before - taken_off).exp_()
                # If there was only padding so far, the sum is zero, and so is what was read.
                total = (before + weights.sum(1)).clamp_(min=torch.finfo(total.dtype).tiny)
                # Divided in each chunk, because half precision has no number for the sum over all image tokens.
                weights /= total[:, None]
                shrunk = before.div_(total)
                kept.append(_keep(weights, dropout))
                if dropout:
                    weights = _drop(weights, kept[-1], dropout)
                    dropped_total.mul_(shrunk).add_(weights.sum(1))
                _add_product(read.mul_(shrunk.flatten(1)[..., None]), weights.flatten(2).mT.to(shared.dtype), tokens)
        if any(ctx.needs_input_grad):
            log_total = taken_off + total.log()
            ctx.save_for_backward(
                image, prompts, keys, values, text_bias, image_bias, read, dropped_total, log_total, *kept
            )
            ctx.text_length, ctx.sizes, ctx.dropout = text_length, sizes, dropout
        return image_out, read.to(keys.dtype), dropped_total[..., None].to(keys.dtype) if dropout else None

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad_image_out: torch.Tensor, grad_read: torch.Tensor, grad_total: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        image, prompts, keys, values, text_bias, image_bias, read, dropped_total, log_total, *kept = ctx.saved_tensors
        dropout = ctx.dropout
        kept = iter(kept)
        with without_autocast(image.device.type):
            shared = _Shared(image, prompts, keys, values, text_bias, image_bias, ctx.text_length, ctx.sizes)
            grad_read = grad_read.to(read.dtype)
            # What the softmax subtracts from the gradients of a text token's logits.
            mean = (grad_read * read).sum(-1).view_as(log_total)
            grad_dropped = None
            if grad_total is not None:
                grad_dropped = grad_total[..., 0].to(read.dtype)
                mean += grad_dropped * dropped_total
            grad_image = torch.empty_like(image) if ctx.needs_input_grad[0] else None
            grad_prompts = torch.empty_like(prompts)
            grad_keys = torch.zeros_like(shared.keys, dtype=shared.exact)
            grad_values = torch.zeros_like(shared.values, dtype=shared.exact)
            grad_read_of_product = grad_read.to(shared.dtype)
            grad_bias = None if text_bias is None else torch.zeros_like(text_bias, dtype=read.dtype)
            for begin, end, tokens in shared.chunks():
                logits = shared.logits(tokens)
                of_image = begin < image.shape[1]
                if of_image:
                    weights, keep = shared.image_weights(logits), next(kept)
                    grad_out = grad_image_out[:, begin:end].to(shared.dtype)
                    dropped = _drop(weights, keep, dropout).flatten(2)
                    _add_product(grad_values, dropped.mT.to(shared.dtype), grad_out)
                    grad_weights = (grad_out @ shared.values.mT).view_as(weights).to(shared.exact)
                    grad_weights = _drop(grad_weights, keep, dropout)
                    grad_logits = shared.grad_of_image_logits(grad_weights, weights)
                    if grad_bias is not None:
                        grad_bias += grad_logits.sum(1)[:, :, None].sum_to_size(grad_bias.shape)
                else:
                    grad_logits = torch.zeros_like(logits, dtype=shared.exact)
                weights, keep = (shared.text_logits(logits, begin, end) - log_total[:, None]).exp_(), next(kept)
                grad_weights = (tokens @ grad_read_of_product.mT).view_as(weights).to(shared.exact)
                if grad_dropped is not None:
                    grad_weights = _drop(grad_weights + grad_dropped[:, None], keep, dropout)
                grad_logits[..., : ctx.text_length] += grad_weights.sub_(mean[:, None]).mul_(weights)
                grad_logits = grad_logits.flatten(2).to(shared.dtype)
                _add_product(grad_keys, grad_logits.mT, tokens)
                # The image before the first adapted layer needs no gradient.
                if ctx.needs_input_grad[0 if of_image else 1]:
                    dropped = _drop(weights, keep, dropout).flatten(2)
                    grad_tokens = dropped.to(shared.dtype) @ grad_read_of_product
                    grad_tokens.baddbmm_(grad_logits, shared.keys)
                    if of_image:
                        assert grad_image is not None
                        grad_image[:, begin:end] = grad_tokens
                    else:
                        length = image.shape[1]
                        grad_prompts[:, begin - length : end - length] = grad_tokens
        grads = [grad_image, grad_prompts, grad_keys.view_as(keys).to(keys.dtype)]
        grads += [grad_values.view_as(values).to(values.dtype), None if grad_bias is None else grad_bias.to(text_bias)]
        return (*grads, None, None, None, None)
