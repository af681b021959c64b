"""Reasons that the graph itself shows: what is multiplied, and how the call is written."""

from __future__ import annotations

from enum import unique

from fp8fx.reasons.reason import Reason

__all__ = ["CallReason", "WeightReason"]


@unique
class WeightReason(Reason):
    """What the weight is."""

    ACTIVATIONS = (
        "activation times activation",
        "Neither operand is a parameter, a buffer or a constant, or a view of one. Attention scores are an example. "
        "A buffer that the graph has already written, such as a cache of keys and values, is no weight either. "
        "`F.linear` and `addmm` name their weight, so there it still is one.",
    )
    OWN_OPERANDS = (
        "both operands are the model's own, and neither is an activation of the call",
        "A product of weights, buffers, constants and what is computed of these alone. "
        "It is part of a weight, and stays exact: the norm that `spectral_norm` divides a weight by, "
        "or `B @ A` that is added to a weight. `F.linear` and `addmm` name their weight, "
        "so they are rewritten even if their input is a parameter.",
    )
    COMPUTED = (
        "the weight is computed, not a parameter, a buffer, a constant or a view of one",
        "It is made from weights and is no view of one: weight_norm, a concatenation, integers cast to floats, "
        "or a cast to float32, which somebody meant. Casts of floats to 16 bits are followed.",
        "Compute it once, and keep it as a parameter or a buffer.",
    )
    GIVEN = (
        "the weight is an input of the graph, and no parameter",
        "`F.linear` with a tensor that the call is given, as `torch.func.functional_call` may pass it.",
        "Pass parameters.",
    )
    NOT_2D = (
        "the weight is {dims}-D, not 2-D",
        "1-D: a product with a vector that is a weight. 3-D: expert weights in one baddbmm or einsum.",
    )
    BATCHED = (
        "the weight is batched",
        "Expert weights in one einsum.",
    )
    GATHERED = (
        "the weight is gathered by an index",
        "Expert weights, one for each row.",
    )
    EXPANDED = (
        "the weight is expanded over a batch",
        "One weight, written as one for each of a batch.",
        "Multiply by the weight itself.",
    )
    SYMBOLIC = (
        "the weight's shape ({k}, {n}) is symbolic",
        "The block sizes come from its numbers.",
    )
    EMPTY = (
        "the weight is empty: K={k}, N={n}",
        "K or N is 0, or there are no experts.",
    )
    FP8_ALONG_N = (
        "the weight is FP8 along the other dimension",
        "An `FP8Weight` (N, K) that is read as `x @ W`, which sums over N. The product reads its dequantized values.",
        "Leave it in high precision: `fp8fx.freeze(model, exclude=...)`.",
    )


@unique
class CallReason(Reason):
    """How the call is written."""

    ON_THE_LEFT = (
        "the weight is on the left of a linear or a sum",
        "`F.linear(W, x)` and `addmm(c, W, x)`.",
        "`W @ x` and `addmv(c, W, x)` are rewritten.",
    )
    OTHER_ARGUMENTS = (
        "called with other arguments than {names}",
        "`out=` and the like.",
    )
    OPERAND_NOT_IN_GRAPH = (
        "an operand is not computed in the graph",
        "A number where a tensor is expected.",
    )
    INPUT_NOT_IN_GRAPH = (
        "the input is not computed in the graph",
        "A number, or nothing, where a module expects its input.",
    )
    ADDEND_NOT_IN_GRAPH = (
        "the addend is not computed in the graph",
        "A number where a tensor is expected.",
    )
    SCALAR_IN_GRAPH = (
        "alpha or beta is computed in the graph",
        "A tensor where a number is expected.",
        "Pass numbers.",
    )
    IN_PLACE = (
        "the result is added to a tensor in place",
        "`addmm_`, `addmv_`, `baddbmm_`, `addbmm_`.",
        "`addmm` and `addmv` are rewritten.",
    )
    BATCH_SUMMED = (
        "the products of a batch are summed",
        "`addbmm`.",
    )
    OPERAND_COUNT = (
        "{count} operands, or one that is not computed in the graph",
        "An einsum of one operand, or of three and more.",
        "Write it as products of two operands.",
    )
    CONTRACTION_UNKNOWN = (
        "what it contracts is not known",
        "The equation or the dimensions of an einsum or a tensordot do not fit its operands.",
    )
    DIAGONAL = (
        "a diagonal is taken",
        "An einsum that is more than a matmul: it names a dimension of one operand twice.",
    )
    BROADCAST = (
        "a dimension of size 1 is broadcast",
        "An einsum that is more than a matmul.",
    )
    SUMMED_ALONE = (
        "a dimension is summed that only one operand has",
        "An einsum that is more than a matmul.",
        "Sum that dimension before or after.",
    )
    NOTHING_CONTRACTED = (
        "nothing is contracted",
        "An einsum that is no matmul: the operands share no dimension.",
    )
    CONTRACTS_ONE = (
        "what is contracted has size 1",
        "A pointwise product, by an einsum, tensordot or inner.",
    )
    FUSED = (
        "a fused call that hides its linears",
        "Recurrent modules and cells (`torch.lstm`, `gru_cell`, ...) and `torch._native_multi_head_attention`. "
        "Fused attention and encoder layers as modules call them are taken apart.",
    )
    FUSED_OF_UNKNOWN = (
        "a fused call that hides its linears, of inputs whose shapes are not known",
        "Fused attention of a symbolic_trace graph.",
        "Pass example inputs.",
    )
    BILINEAR = (
        "each product is of two inputs and a weight",
        "`F.bilinear`.",
    )
    CHAIN = (
        "a chain of matmuls, whose order torch chooses",
        "`torch.linalg.multi_dot`, `torch.chain_matmul`.",
        "Write the matmuls one by one.",
    )
    OWN_FORWARD = (
        "{form} has a forward of its own",
        "An nn.Linear called as a module whose call does more than a linear.",
        "`torch.compile` looks inside.",
    )
    HOOKS = (
        "the module has hooks",
        "An nn.Linear, or a convolution, called as a module whose call does more than a linear.",
        "`torch.compile` looks inside.",
    )
    NOT_TRACED = (
        "symbolic_trace does not look inside; pass torch.export.export(model, args)",
        "Modules of torch, such as nn.LSTM and nn.TransformerEncoderLayer.",
        "torch.export and torch.compile look inside.",
    )
    SINGLE_IMAGE = (
        "a convolution of a single image",
        "An image without a batch, with `convolutions=True`.",
        "Add a dimension for the batch.",
    )
    NOT_GROUPED = (
        "not rows sorted by experts and a weight for each",
        "A `grouped_mm` of other shapes than rows (M, K), weights (E, K, N) and `offs`.",
    )
    GROUPED_FALLBACK = (
        "not in bfloat16, the dtype that grouped matmuls have kernels for",
        "transformers' `grouped_mm_fallback`, which it calls for other dtypes.",
        "Run the model in bfloat16.",
    )
