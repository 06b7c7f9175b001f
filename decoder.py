"""Localizing and classifying decoder layers (Sec. 4.2, Fig. 4, Eq. 1-2; the paper's supplement D).

Each frame is decoded by itself. The localizing layers turn A actor boxes (anchors) and embeddings
into actor features f, each actor looking at a feature map of its own: its mixture of the L levels,
x (the actor-specific context feature). The classifying layers join f and x, and let C class
queries, each paired with the actor's positional query P, look for what tells their class: a
(class, actor) pair has an attention map of its own (Eq. 1).

Nothing of the localizing layers depends on the classifying ones, so they all run first; the
classifying layers then run over a flat list of I (frame, actor) pairs.

The paper is silent on some points; here, as in the released model: f is detached; the class
queries of an actor attend to each other without projections of query, key and value. Also as
released, a class logit is the mean over the channels of a LayerNorm. beside/released.py lists where
the released model departs from the paper; `anchor_before_norm` and `three_way_confidence` are
marked lines here. In the benchmark presets its ReleasedClassifyingLayer stands in for
ClassifyingLayer: one block for all convolutions, no W_Q and W_K on the concatenations, class
attention also on padding, no add & norm behind it. beside/ablations.py has Tables 1 to 4. Small
methods (`add_...`, `level_shares`, `combine`, `convolve`, `class_attention_folded`,
`class_predictions`) are what these two files replace.

Sizes (model.Config): A = 15 of UCF101-24 and AVA, 5 of JHMDB; D = 256, M = 8, Y = 3 (AVA 6), 3
convolution blocks. Names: `P` is the paper's actor positional query, of the anchor's y and x;
`query_pos` is an MLP of all four numbers of the anchor, for the self-attention among actors and the
first cross attention. Padding is masked in the localizing layers' attention and in class attention;
the benchmark presets leave class attention unmasked. Convolution blocks use what the encoder left
there. Eq. 1 and 2 print one map a class; attention has M heads here, as released. A logit's sigmoid
is taken in model.scores, which multiplies it by the confidence in all presets but AVA's; its loss
is in objective.py. Where the actor embeddings are zeros (all presets but synthetic), the first
layer's self-attention gives all actors one vector, and so its level shares are one learned mixture.
"""

# B clips, T frames, F = B*T frames of the batch, A actors, C classes, L levels, N cells (H*W), D
# channels, M heads, Y decoder layers, I (frame, actor) pairs that are classified

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from encoder import in_pieces, sine_embedding

PIECE = 8  # frames whose actors' maps are held at once where no gradient is wanted


class MLP(nn.Module):
    """Linear layers with ReLU between: sizes (in, hidden, ..., out)."""

    def __init__(self, *sizes):
        super().__init__()
        pairs = zip(sizes, sizes[1:])
        self.layers = nn.ModuleList(nn.Linear(before, after) for before, after in pairs)

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


def inverse_sigmoid(x, eps=1e-5):
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


def to_heads(x, num_heads):
    """(..., N, D) -> (..., M, N, D/M)"""
    return x.unflatten(-1, (num_heads, -1)).transpose(-3, -2)


def merge_heads(x):
    """(..., M, N, D/M) -> (..., N, D)"""
    return x.transpose(-3, -2).flatten(-2)


def masked_softmax(logits, padding):
    """Attention weights of logits (I, ., ., N) over N cells, of which those of padding (I, N) get
    none."""
    # A float32 island: a soft-max over hundreds of cells sums weights that bfloat16 would round
    # away.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.masked_fill(padding[:, None, None], -torch.inf).softmax(-1)


class LocalizingLayer(nn.Module):
    """One localizing layer (Fig. 4a). Query and key projections are named by the role they play in
    Sec. 4.2."""

    def __init__(self, dim, num_heads, num_levels, dim_feedforward, dropout, first):
        super().__init__()
        self.num_heads, self.first = num_heads, first
        self.self_query_content = nn.Linear(dim, dim)
        self.self_query_position = nn.Linear(dim, dim)
        self.self_key_content = nn.Linear(dim, dim)
        self.self_key_position = nn.Linear(dim, dim)
        self.self_value = nn.Linear(dim, dim)
        self.self_output = nn.Linear(dim, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.add_level_weights(dim, num_levels)
        self.context_norm = nn.LayerNorm(dim)
        self.cross_query_content = nn.Linear(dim, dim)
        if first:
            self.cross_query_box = nn.Linear(dim, dim)
        self.cross_query_position = nn.Linear(dim, dim)
        self.cross_key_content = nn.Linear(dim, dim)
        self.cross_key_position = nn.Linear(dim, dim)
        self.cross_value = nn.Linear(dim, dim)
        self.cross_output = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, dim)
        self.norm3 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def add_level_weights(self, dim, num_levels):
        self.level_weights = nn.Linear(dim, num_levels)

    def level_shares(self, actors):
        """w: how much of each level is in an actor's map, read off the embedding behind the
        self-attention, (F, A, D) -> (F, A, L)."""
        return self.level_weights(actors).softmax(-1)

    def context(self, memory, shares):
        """The actor-specific context features x_i = LayerNorm(sum over l of w_il V_l): memory (F,
        L, N, D), shares (F, A, L) -> (F, A, N, D)."""
        return self.context_norm(torch.einsum("fal,flnd->fand", shares, memory))

    def self_attention(self, actors, query_pos):
        """Among the actors of a frame, (F, A, D) -> (F, A, D); the value is of the content only."""
        query = self.self_query_content(actors) + self.self_query_position(query_pos)
        key = self.self_key_content(actors) + self.self_key_position(query_pos)
        query, key, value = (to_heads(part, self.num_heads)  # (F, M, A, D/M)
                             for part in (query, key, self.self_value(actors)))
        dropout = self.dropout.p if self.training else 0.0
        attended = merge_heads(F.scaled_dot_product_attention(query, key, value, dropout_p=dropout))
        return self.norm1(actors + self.dropout(self.self_output(attended)))

    def cross_attention(self, actors, query_pos, P, memory, shares, key_pos, padding):
        """Each actor looks at its own map: query [content | Linear(P)], key [content | position],
        the two concatenated in each head.

        actors, query_pos, P (F, A, D); memory (F, L, N, D); shares (F, A, L); key_pos (F, N, D);
        padding (F, N). Returns (F, A, D) and the attention weights (F, A, N), mean over heads.
        """
        heads = self.num_heads
        context = self.context(memory, shares)  # (F, A, N, D)
        query = self.cross_query_content(actors)  # (F, A, D)
        query_position = self.cross_query_position(P)  # (F, A, D)
        # In the first layer the box is added to the content query, the position to the content key:
        # q (k + k_pos) = q k + q k_pos, hence q is added to the position query.
        if self.first:
            query = query + self.cross_query_box(query_pos)
            query_position = query_position + query
        query = query.unflatten(-1, (heads, -1))  # (F, A, M, D/M)
        query_position = query_position.unflatten(-1, (heads, -1))
        key = self.cross_key_content(context).unflatten(-1, (heads, -1))  # (F, A, N, M, D/M)
        key_position = to_heads(self.cross_key_position(key_pos), heads)  # (F, M, N, D/M)
        # The product of two concatenations is the sum of the products of their parts.
        logits = torch.einsum("famk,fanmk->famn", query, key)
        logits = logits + torch.einsum("famk,fmnk->famn", query_position, key_position)
        channels = 2 * actors.shape[-1] / heads
        attention = masked_softmax(logits * channels ** -0.5, padding)  # (F, A, M, N)
        value = self.cross_value(context).unflatten(-1, (heads, -1))  # (F, A, N, M, D/M)
        weights = self.dropout(attention).to(value.dtype)
        attended = torch.einsum("famn,fanmk->famk", weights, value)  # (F, A, M, D/M)
        return self.cross_output(attended.flatten(-2)), attention.mean(2)

    def forward(self, actors, query_pos, P, memory, key_pos, padding):
        """actors, query_pos, P (F, A, D) -> actor features f (F, A, D), the layer's output (F, A,
        D), level shares (F, A, L), attention weights (F, A, N)."""
        actors = self.self_attention(actors, query_pos)
        shares = self.level_shares(actors)
        per_frame = (actors, query_pos, P, memory, shares, key_pos, padding)
        attended, attention = in_pieces(self.cross_attention, PIECE, *per_frame)
        f = self.norm2(actors + self.dropout(attended))
        hidden = self.dropout(F.relu(self.linear1(f)))
        return f, self.norm3(f + self.dropout(self.linear2(hidden))), shares, attention


class ConvBlock(nn.Module):
    """3x3 convolution, LayerNorm, linear x4, GELU, linear back, residual. (I, H, W, D) -> the
    same."""

    def __init__(self, dim):
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, kernel_size=3, padding=1)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.linear1 = nn.Linear(dim, 4 * dim)
        self.linear2 = nn.Linear(4 * dim, dim)

    def forward(self, x):
        # an (I, H, W, D) tensor seen as (I, D, H, W) is in channels-last order: no copy on either
        # side
        y = self.conv1(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.linear2(F.gelu(self.linear1(self.norm(y))))


class ClassifyingLayer(nn.Module):
    """One classifying layer (Fig. 4b): class queries, and where each of them looks (Eq. 1 and
    2)."""

    def __init__(self, dim, num_heads, dim_feedforward, dropout, num_blocks):
        super().__init__()
        self.num_heads = num_heads
        self.actor_linear1 = nn.Linear(dim, dim_feedforward)
        self.actor_linear2 = nn.Linear(dim_feedforward, dim)
        self.actor_norm = nn.LayerNorm(dim)
        self.context_norm = nn.LayerNorm(dim)
        self.blocks = nn.ModuleList(ConvBlock(dim) for _ in range(num_blocks))
        self.self_output = nn.Linear(dim, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.value = nn.Linear(dim, dim)
        self.add_attention_projections(dim)
        self.output = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, dim)
        self.norm3 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def add_attention_projections(self, dim):
        """W_Q and W_K of Eq. 1. A bias of the keys would add the same to all logits of a query: no
        soft-max sees it."""
        self.query = nn.Linear(2 * dim, 2 * dim)
        self.key = nn.Linear(2 * dim, 2 * dim, bias=False)

    def combine(self, f, context, padding):
        """Actor feature (I, D) and its context (I, N, D) as one map (I, N, D): their sum (Table
        4)."""
        return f[:, None] + context

    def convolve(self, z):
        """The convolution blocks, (I, H, W, D) -> the same."""
        for block in self.blocks:
            z = block(z)
        return z

    def interaction(self, f, context, padding, size):
        """z: where actor and context meet. f (I, D), context (I, N, D), padding (I, N) -> (I, N,
        D)."""
        hidden = self.dropout(F.relu(self.actor_linear1(f)))
        f = self.actor_norm(f + self.dropout(self.actor_linear2(hidden)))
        z = self.context_norm(self.combine(f, context, padding))
        return self.convolve(z.unflatten(1, size)).flatten(1, 2)  # over (I, H, W, D)

    def self_attention(self, queries):
        """Among the class queries of an actor, (I, C, D) -> the same; without projections of
        query, key and value."""
        q = to_heads(queries, self.num_heads)  # (I, M, C, D/M)
        dropout = self.dropout.p if self.training else 0.0
        attended = merge_heads(F.scaled_dot_product_attention(q, q, q, dropout_p=dropout))
        return self.norm1(queries + self.dropout(self.self_output(attended)))

    def class_attention(self, queries, P, z, key_pos, padding):
        """Eq. 1 and 2 as they are printed: the attention maps of the C classes of each actor.

        To be read; `forward` calls `class_attention_folded`, the same numbers (a test compares), or
        what other classifying layers have in its place.
        queries (I, C, D); P (I, D); z (I, N, D); key_pos (I, N, D), the P_V of Eq. 1, which is the
        position table of the common grid's map; padding (I, N).

        Returns (I, M, C, N), which sum to 1 over the N cells.
        """
        nu = torch.cat([queries, P[:, None].expand_as(queries)], -1)  # (I, C, 2D): class and actor
        eta = torch.cat([z, key_pos], -1)  # (I, N, 2D): actor and region
        q = to_heads(self.query(nu), self.num_heads)  # (I, M, C, 2D/M)
        k = to_heads(self.key(eta), self.num_heads)  # (I, M, N, 2D/M)
        logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5  # (I, M, C, N)
        return masked_softmax(logits, padding)

    def class_attention_folded(self, queries, P, z, key_pos, padding):
        """The same numbers for less: q k^T = (nu W_Q) (eta W_K)^T = ((nu W_Q) W_K^T) eta^T.

        W_K meets C queries of an actor in place of its N cells, and eta is not built.
        """
        nu = torch.cat([queries, P[:, None].expand_as(queries)], -1)  # (I, C, 2D)
        q = to_heads(self.query(nu), self.num_heads)  # (I, M, C, 2D/M)
        key_weight = self.key.weight.unflatten(0, (self.num_heads, -1))  # (M, 2D/M, 2D)
        folded = torch.einsum("imck,mkd->imcd", q, key_weight).flatten(1, 2)  # (I, M*C, 2D)
        of_z, of_position = folded.split(z.shape[-1], dim=-1)  # (I, M*C, D) each
        logits = of_z @ z.transpose(-1, -2) + of_position @ key_pos.transpose(-1, -2)
        logits = logits.unflatten(1, (self.num_heads, -1))  # (I, M, C, N)
        return masked_softmax(logits * q.shape[-1] ** -0.5, padding)

    def add_and_norm(self, queries, attended):
        """Behind the cross attention: the paper does not say, DETR's decoder has add & norm."""
        return self.norm2(queries + self.dropout(attended))

    def forward(self, queries, f, context, P, key_pos, padding, size):
        """queries (I, C, D), or (1, C, D) in the first layer; actor feature f (I, D); its context
        and key_pos (I, N, D); P (I, D); padding (I, N); size H, W, the N cells of which are all in
        order.

        Returns the class features (I, C, D) and the class attention maps (I, M, C, N).
        """
        z = self.interaction(f, context, padding, size)
        # The first layer's queries are all pairs' own: one self-attention, one dropout mask.
        queries = self.self_attention(queries).expand(len(z), -1, -1)  # (I, C, D)
        attention = self.class_attention_folded(queries, P, z, key_pos, padding)
        # Values are of x, the map that Sec. 4.2 gives to CDL as key and value; z, where the actor
        # has come in, only decides where to look: what is read there is the scene itself.
        value = to_heads(self.value(context), self.num_heads)  # (I, M, N, D/M)
        attended = merge_heads(self.dropout(attention).to(value.dtype) @ value)  # (I, C, D)
        attended = self.output(attended)
        queries = self.add_and_norm(queries, attended)
        hidden = self.dropout(F.relu(self.linear1(queries)))
        return self.norm3(queries + self.dropout(self.linear2(hidden))), attention


class Decoder(nn.Module):
    """Both kinds of layers and the heads. See `forward`.

    localizing, classifying: lists of Y layers each; frequencies (D/2,) of the anchors' sine
    embedding, 10000^(-2 floor(i/2) / (D/2)) (synthetic: 2 to .1 cycles an image), where the image
    is 2 pi long; recompute: each classifying layer again in the backward pass.
    """

    def __init__(self, localizing, classifying, dim, num_queries, num_frames, num_classes,
                 frequencies, logit_dropout=0.0, recompute=False, three_way_confidence=False,
                 anchor_before_norm=False):
        super().__init__()
        self.num_queries, self.num_frames = num_queries, num_frames
        self.recompute, self.anchor_before_norm = recompute, anchor_before_norm
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.anchors = nn.Parameter(torch.empty(num_queries * num_frames, 4))  # row a * T + t
        self.box_position = MLP(2 * dim, dim, dim)
        if len(localizing) > 1:  # the first layer's scale is 1
            self.query_scale = MLP(dim, dim, dim)
        self.size_modulation = MLP(dim, dim, 2)
        self.localizing = nn.ModuleList(localizing)
        self.norm = nn.LayerNorm(dim)
        self.box_head = MLP(dim, dim, dim, 4)
        outputs = 3 if three_way_confidence else 1  # Quirk
        self.confidence_head = nn.Linear(dim, outputs)
        self.add_classifier(classifying, dim, num_classes, logit_dropout)

    def add_classifier(self, classifying, dim, num_classes, logit_dropout):
        self.classifying = nn.ModuleList(classifying)
        # Drawn by the model: Xavier-uniform, N(0, 1) in the synthetic preset.
        self.class_queries = nn.Parameter(torch.empty(num_classes, dim))
        self.class_norm = nn.LayerNorm(dim)
        self.logit_dropout = nn.Dropout(logit_dropout)

    @torch.no_grad()
    def initialise(self):
        """Random anchors, which no layer moves at first; the model has drawn the matrices."""
        nn.init.normal_(self.anchors)
        nn.init.zeros_(self.box_head.layers[-1].weight)
        nn.init.zeros_(self.box_head.layers[-1].bias)

    def first_anchors(self):
        """The learned boxes that the first layer starts from, (T, A, 4) in [0, 1]."""
        return self.anchors.sigmoid().unflatten(0, (self.num_queries, -1)).transpose(0, 1)

    def positional_query(self, actors, anchors, embedding, first):
        """P (F, A, D): the embedding of the anchor's y and x, divided by its height and width and
        multiplied by those the actor asks for (DAB-DETR's modulation), times a scale read off the
        actor."""
        ref_wh = self.size_modulation(actors).sigmoid()  # (F, A, 2)
        modulation = (ref_wh / anchors[..., 2:]).flip(-1)  # (F, A, 2): of y by h, of x by w
        P = (embedding[..., :2, :] * modulation[..., None]).flatten(-2)  # (F, A, 2 * D/2)
        if first:
            return P
        return P * self.query_scale(actors)

    def boxes(self, actors, anchors):
        """The box head's step from the anchors: (F, A, D), (F, A, 4) -> (F, A, 4) float32."""
        # A float32 island: a step in bfloat16 would be off by a third of a pixel.
        with torch.autocast(actors.device.type, enabled=False):
            delta = self.box_head(actors.to(self.box_head.layers[0].weight.dtype))
            return (delta + inverse_sigmoid(anchors)).sigmoid()

    def confidence(self, actors):
        """Confidence logit, (F, A, D) -> (F, A) float32."""
        with torch.autocast(actors.device.type, enabled=False):  # as for the boxes: it ranks them
            z = self.confidence_head(actors.to(self.confidence_head.weight.dtype))
        if z.shape[-1] == 3:  # Quirk three_way_confidence: the logit of soft-max entry 1.
            return z[..., 1] - torch.logsumexp(z[..., ::2], dim=-1)
        return z[..., 0]

    def localize(self, memory, key_pos, padding, anchors, actors):
        """All localizing layers: memory (F, L, N, D), key_pos (F, N, D), padding (F, N), anchors
        (F, A, 4), actors (F, A, D).

        Returns for each layer its predictions {"pred_boxes", "pred_conf"}, and what is classified:
        {"f", "P", "actors" (F, A, D), "shares" (F, A, L), "attention" (F, A, N)}.
        """
        predictions, outputs = [], []
        for number, layer in enumerate(self.localizing):
            yxwh = torch.cat([anchors[..., :2].flip(-1), anchors[..., 2:]], -1)  # (F, A, 4)
            embedding = sine_embedding(yxwh * 2 * math.pi, self.frequencies)  # (F, A, 4, D/2)
            query_pos = self.box_position(embedding.flatten(-2))  # (F, A, D)
            P = self.positional_query(actors, anchors, embedding, number == 0)
            f, actors, shares, attention = layer(actors, query_pos, P, memory, key_pos, padding)
            normed = self.norm(actors)
            boxes = self.boxes(normed, anchors)
            predictions.append({"pred_boxes": boxes, "pred_conf": self.confidence(normed)})
            # f is detached: through the classifying layers the class loss reaches the localizing
            # ones by x, P and the level shares alone (and, where the score includes it, by the
            # confidence). With f attached, in a trial on planted maps that is not in this
            # repository, the localizing layers did the looking and class attention stayed at the
            # actor.
            outputs.append({"f": f.detach(), "P": P, "shares": shares, "actors": normed,
                            "attention": attention})
            if self.anchor_before_norm:  # Quirk: the next anchor is read before the norm.
                boxes = self.boxes(actors, anchors)
            anchors = boxes.detach()  # a box is learned by its own layer, as in DAB-DETR
        return predictions, outputs

    def class_predictions(self, predictions, outputs, memory, key_pos, padding, size, gate,
                          return_attention):
        """Adds "pred_logits" (F, A, C) to the predictions and, if asked, "attention" (F, A, C, H,
        W), with return_attention="heads" (F, A, C, M, H, W).

        Without a gate nothing here depends on values, so that nothing waits for the GPU.
        """
        per_frame = [memory, key_pos, padding]
        per_frame += [torch.stack([of[name] for of in outputs], 1) for name in ("f", "P", "shares")]
        if gate > 0:
            per_frame.append(predictions[-1]["pred_conf"].sigmoid() >= gate)  # keep (F, A)
        classify = partial(self.classify, size, return_attention)
        logits, *maps = in_pieces(classify, PIECE, *per_frame)
        for number, prediction in enumerate(predictions):
            prediction["pred_logits"] = logits[:, :, number]
            if return_attention:
                prediction["attention"] = maps[number].unflatten(-1, size)

    def classify(self, size, return_attention, memory, key_pos, padding, f, P, shares, keep=None):
        """All classifying layers: f, P (F, Y, A, D), shares (F, Y, A, L), keep (F, A) or None.

        Returns the class logits (F, A, Y, C) and, if asked, the maps of each layer (F, A, ...).
        """
        queries = self.class_queries[None]  # (1, C, D)
        logits, maps = [], []
        for number in range(len(self.classifying)):
            arguments = (number, size, queries, memory, key_pos, padding,
                         f[:, number], P[:, number], shares[:, number], keep)
            if self.recompute and torch.is_grad_enabled():
                queries, attention = checkpoint(self.classify_layer, *arguments,
                                                use_reentrant=False)
            else:
                queries, attention = self.classify_layer(*arguments)
            # A class feature's logit. The mean of a LayerNorm is no constant: its learned weight
            # makes it a linear read-out. Benchmark presets put a loss on the last layer alone.
            logits.append(self.logit_dropout(self.class_norm(queries)).mean(-1).float())
            if return_attention == "heads":
                maps.append(attention.transpose(1, 2))  # (I, C, M, N)
            elif return_attention:
                maps.append(attention.mean(1))  # (I, C, N)
        results = [torch.stack(logits, 1), *maps]  # (I, Y, C), then a layer's maps each
        if keep is None:
            return tuple(part.unflatten(0, (len(f), -1)) for part in results)  # (F, A, ...)
        fills = [-1e4] + [0.0] * len(maps)
        return tuple(back_to_actors(part, keep, fill) for part, fill in zip(results, fills))

    def classify_layer(self, number, size, queries, memory, key_pos, padding, f, P, shares, keep):
        """Classifying layer `number` on all pairs of some frames, or where keep (F, A) is True."""
        context = self.localizing[number].context(memory, shares)  # (F, A, N, D)
        num_actors = f.shape[1]
        key_pos = key_pos[:, None].expand(-1, num_actors, -1, -1)  # (F, A, N, D)
        padding = padding[:, None].expand(-1, num_actors, -1)  # (F, A, N)
        if keep is None:
            pairs = [part.flatten(0, 1) for part in (f, context, P, key_pos, padding)]
        else:
            pairs = [part[keep] for part in (f, context, P, key_pos, padding)]  # (I, ...)
        return self.classifying[number](queries, *pairs, size)

    def forward(self, memory, key_pos, padding, anchors, actors, gate=0.0, return_attention=False):
        """memory (F, L, H, W, D), key_pos (F, H, W, D), padding (F, H, W), anchors (F, A, 4), actor
        embeddings (F, A, D): the paper's AE, zeros in its presets and not learned, so that a
        frame's queries differ by their anchors alone.

        Returns a list with a dict for each layer: pred_boxes (F, A, 4), pred_conf (F, A) and
        pred_logits (F, A, C), logits whose sigmoid is in model.scores, all float32; and the class
        attention maps of the last layer, the mean over heads (F, A, C, H, W), with
        return_attention="heads" (F, A, C, M, H, W), or None. Earlier layers have theirs in their
        dicts, as "attention": asked for, all Y are held. Actors whose confidence is below `gate`
        are not classified: their logits are -1e4.
        """
        size = tuple(memory.shape[2:4])
        memory, key_pos, padding = memory.flatten(2, 3), key_pos.flatten(1, 2), padding.flatten(1)
        predictions, outputs = self.localize(memory, key_pos, padding, anchors, actors)
        self.class_predictions(predictions, outputs, memory, key_pos, padding, size, gate,
                               return_attention)
        return predictions, predictions[-1].pop("attention", None)


def back_to_actors(part, keep, fill):
    """Values (I, ...) where keep (F, A) is True, and `fill` for the others -> (F, A, ...)."""
    everyone = part.new_full((*keep.shape, *part.shape[1:]), fill)
    everyone[keep] = part
    return everyone
