"""Localizing and classifying decoder layers (Sec. 4.2, Fig. 4, Eq. 1-2; the paper's supplement D).

Each frame is decoded by itself. The localizing layers turn A actor boxes (anchors) and embeddings into actor features f,
each actor looking at a feature map of its own: its mixture of the L levels, x (the actor-specific context feature).
The classifying layers join f and x, and let C class queries, each paired with the actor's positional query P, look for
what tells their class: a (class, actor) pair has an attention map of its own (Eq. 1).

Nothing of the localizing layers depends on the classifying ones, so they all run first; the classifying layers then run
over a flat list of (frame, actor) pairs, in pieces where no gradient is wanted, and only for actors worth it (`gate`).

What Tables 1 to 4 compare with stands behind switches: `OneMapDecoder` is DETR's decoder, and LDL alone has a linear head
for the classes; `level_shares` has the ways to mix the levels, `class_position` takes P out of the class queries, `combine`
chooses how actor and context meet.

Departures of the released model, by their names in SPEC.md: `anchor_before_norm`, `shared_block`, `bare_output`,
`split_heads`, `unmasked_padding`, `unused_tensors`; each has its comment where it acts.
"""

# B clips, T frames, F = B*T frames of the batch, A actors, C classes, L levels, N cells (H*W), D channels, M heads,
# I (frame, actor) pairs that are classified

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

PIECE = 8  # frames whose actors' maps are held at once where no gradient is wanted


class MLP(nn.Module):
    """Linear layers with ReLU between: sizes (in, hidden, ..., out)."""

    def __init__(self, *sizes):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(before, after) for before, after in zip(sizes, sizes[1:])])

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


def inverse_sigmoid(x, eps=1e-5):
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


def anchor_embedding(anchors, frequencies, num_groups=1):
    """Sine embedding of boxes (..., 4) cx, cy, w, h -> (..., 4, n) in the order y, x, w, h; frequencies (n,), channels as
    in `encoder.position_table`."""
    order = anchors[..., [1, 0, 2, 3]]
    angle = order[..., None] * (2 * math.pi) * frequencies.to(anchors)  # (..., 4, n)
    pairs = torch.stack([angle[..., 0::2].sin(), angle[..., 1::2].cos()], dim=-1)  # (..., 4, n/2, 2)
    return pairs.unflatten(-2, (-1, num_groups)).transpose(-3, -2).flatten(-3)  # (..., 4, n)


def join_yx(embedding, num_groups):
    """The positional part of an anchor embedding: (..., 2, n) for y and x -> (..., 2n), y and x side by side in a group."""
    return embedding.unflatten(-1, (num_groups, -1)).transpose(-3, -2).flatten(-3)  # (..., groups, 2, n/groups) -> (..., 2n)


def to_heads(x, num_heads):
    """(..., N, D) -> (..., M, N, D/M)"""
    return x.unflatten(-1, (num_heads, -1)).transpose(-3, -2)


def merge_heads(x):
    """(..., M, N, D/M) -> (..., N, D)"""
    return x.transpose(-3, -2).flatten(-2)


def by_place(num_heads, dim):
    """Identity projection of a positional part, times 2 in the first head down to 1 in the last: a narrow to a wide look.
    (M, D/M, D)"""
    return (torch.eye(dim).unflatten(0, (num_heads, -1)) * torch.linspace(2, 1, num_heads)[:, None, None])


class LocalizingLayer(nn.Module):
    """One localizing layer (Fig. 4a). Weights of the query and key projections carry the role they play in Sec. 4.2."""

    def __init__(self, dim, num_heads, num_levels, dim_feedforward, dropout, first, aggregation="actor"):
        super().__init__()
        self.num_heads, self.num_levels, self.first, self.aggregation = num_heads, num_levels, first, aggregation
        self.self_query_content = nn.Linear(dim, dim)
        self.self_query_position = nn.Linear(dim, dim)
        self.self_key_content = nn.Linear(dim, dim)
        self.self_key_position = nn.Linear(dim, dim)
        self.self_value = nn.Linear(dim, dim)
        self.self_output = nn.Linear(dim, dim)
        self.norm1 = nn.LayerNorm(dim)
        if aggregation == "actor":
            self.level_weights = nn.Linear(dim, num_levels)
        elif aggregation == "weighted":
            self.level_weights = nn.Parameter(torch.zeros(num_levels))
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

    def initialise_by_place(self):
        """An actor first looks at and around its own box."""
        for projection in (self.cross_query_position, self.cross_key_position):
            projection.weight.copy_(by_place(self.num_heads, projection.in_features).flatten(0, 1))
            nn.init.zeros_(projection.bias)

    def self_attention(self, x, query_position):
        """Among the actors of a frame, (F, A, D) -> (F, A, D); the value is of the content only."""
        query = self.self_query_content(x) + self.self_query_position(query_position)
        key = self.self_key_content(x) + self.self_key_position(query_position)
        parts = [to_heads(part, self.num_heads) for part in (query, key, self.self_value(x))]  # (F, M, A, D/M)
        dropout = self.dropout.p if self.training else 0.0
        attended = merge_heads(F.scaled_dot_product_attention(*parts, dropout_p=dropout))  # (F, A, D)
        return self.norm1(x + self.dropout(self.self_output(attended)))

    def level_shares(self, x):
        """How an actor's map is mixed of the levels (Table 2), (..., A, L): read off the actor x (..., A, D); or one learned
        mixture, or the mean, for all actors."""
        if self.aggregation == "actor":
            return self.level_weights(x).softmax(-1)
        shares = self.level_weights.softmax(-1) if self.aggregation == "weighted" else \
            x.new_full((self.num_levels,), 1 / self.num_levels)
        return shares.expand(*x.shape[:-1], -1)

    def context(self, memory, levels):
        """Actor-specific context features x: memory (..., L, N, D), levels (..., A, L) -> (..., A, N, D)."""
        mixed = torch.einsum("...al,...lnd->...and", levels, memory)
        return self.context_norm(mixed)

    def cross_attention(self, x, query_position, positional_query, memory, levels, key_positions, padding):
        """Each actor looks at its own map: query [content | Linear(P)], key [content | position], joined per head.

        x, query_position, positional_query (F, A, D), memory (F, L, N, D), key_positions (F, N, D), padding (F, N).
        Returns (F, A, D) and the soft-max weights (F, A, N), mean over heads.
        """
        heads = self.num_heads
        context = self.context(memory, levels)                                              # (F, A, N, D)
        place = to_heads(self.cross_key_position(key_positions), heads)                     # (F, M, N, D/M)
        by_content = self.cross_query_content(x)
        by_place = self.cross_query_position(positional_query)
        if self.first:  # the first layer adds the box to the content query, the position to the content key
            by_content = by_content + self.cross_query_box(query_position)
            by_place = by_place + by_content
        content = self.cross_key_content(context).unflatten(-1, (heads, -1))                # (F, A, N, M, D/M)
        logits = torch.einsum("famk,fanmk->famn", by_content.unflatten(-1, (heads, -1)), content)
        logits = logits + torch.einsum("famk,fmnk->famn", by_place.unflatten(-1, (heads, -1)), place)
        logits = logits * (2 * x.shape[-1] / heads) ** -0.5                                 # a head has 2D/M channels
        logits = logits.masked_fill(padding[:, None, None], -torch.inf)                     # (F, A, M, N)
        attention = logits.float().softmax(-1).to(context.dtype)
        value = self.cross_value(context).unflatten(-1, (heads, -1))                        # (F, A, N, M, D/M)
        attended = torch.einsum("famn,fanmk->famk", self.dropout(attention), value)
        return self.cross_output(attended.flatten(-2)), attention.mean(2)

    def forward(self, x, query_position, positional_query, memory, key_positions, padding):
        """x, query_position, positional_query (F, A, D) -> actor features f (F, A, D), the layer's output (F, A, D),
        level weights (F, A, L), its attention maps (F, A, N)."""
        x = self.self_attention(x, query_position)
        levels = self.level_shares(x)
        per_frame = (x, query_position, positional_query, memory, levels, key_positions, padding)
        if torch.is_grad_enabled():
            attended, maps = self.cross_attention(*per_frame)
        else:  # the actors' maps of a few frames at a time
            pieces = [self.cross_attention(*piece) for piece in zip(*(part.split(PIECE) for part in per_frame))]
            attended, maps = (torch.cat(parts) for parts in zip(*pieces))
        features = self.norm2(x + self.dropout(attended))
        output = self.linear2(self.dropout(F.relu(self.linear1(features))))
        return features, self.norm3(features + self.dropout(output)), levels, maps


class ConvBlock(nn.Module):
    """3x3 convolution, LayerNorm, linear x4, GELU, linear back, residual. (I, H, W, D) -> the same."""

    def __init__(self, dim):
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, kernel_size=3, padding=1)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.linear1 = nn.Linear(dim, 4 * dim)
        self.linear2 = nn.Linear(4 * dim, dim)

    def forward(self, x):
        # a (I, H, W, D) tensor seen as (I, D, H, W) is in channels-last order: no copy on either side
        y = self.conv1(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.linear2(F.gelu(self.linear1(self.norm(y))))


class ClassifyingLayer(nn.Module):
    """One classifying layer (Fig. 4b, Eq. 1). quirks: those in force of the module's list; class_position: whether P is part
    of the class queries (Table 3); combine: "sum", or another way of Table 4."""

    def __init__(self, dim, num_heads, dim_feedforward, dropout, num_blocks, quirks, class_position=True, combine="sum"):
        super().__init__()
        self.num_heads, self.quirks, self.class_position, self.combine = num_heads, quirks, class_position, combine
        self.num_blocks = num_blocks
        self.actor_linear1 = nn.Linear(dim, dim_feedforward)
        self.actor_linear2 = nn.Linear(dim_feedforward, dim)
        self.actor_norm = nn.LayerNorm(dim)
        if combine == "concat":
            self.join = nn.Linear(2 * dim, dim)
        elif combine != "sum":
            self.join = nn.MultiheadAttention(dim, num_heads, dropout, batch_first=True)
        self.context_norm = nn.LayerNorm(dim)
        # quirk shared_block: one block applied num_blocks times
        self.blocks = nn.ModuleList([ConvBlock(dim) for _ in range(1 if "shared_block" in quirks else num_blocks)])
        self.self_output = nn.Linear(dim, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.value = nn.Linear(dim, dim)
        if "split_heads" in quirks:  # q and the key positions stay unprojected; z and P have a projection each
            self.key_content = nn.Linear(dim, dim)
            if class_position:
                self.query_position = nn.Linear(dim, dim)
        else:                        # Eq. 1: W_Q and W_K of the whole concatenations
            width = 2 * dim if class_position else dim
            self.query = nn.Linear(width, 2 * dim)
            self.key = nn.Linear(width, 2 * dim, bias=False)  # no soft-max sees a bias of the keys
        if "unused_tensors" in quirks:  # held and counted, never used: frozen, so that no distributed step waits for them
            self.unused_query = nn.Linear(dim, dim).requires_grad_(False)
        self.output = nn.Linear(dim, dim)
        if "bare_output" not in quirks:
            self.norm2 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, dim_feedforward)
        self.linear2 = nn.Linear(dim_feedforward, dim)
        self.norm3 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def initialise_by_place(self):
        """Half of each head content, half position, so that every class first looks at and around the actor."""
        dim, heads = self.output.in_features, self.num_heads
        place = by_place(heads, dim)                                                        # (M, D/M, D)
        if not self.class_position:
            return
        if "split_heads" in self.quirks:  # position has heads of its own already
            self.query_position.weight.copy_(place.flatten(0, 1))
            return
        for weight in (self.query.weight, self.key.weight):
            content = nn.init.xavier_uniform_(torch.empty(dim, dim)).view(heads, -1, dim)   # (M, D/M, D)
            rows = torch.cat([torch.cat([content, 0 * place], -1), torch.cat([0 * content, place], -1)], 1)
            weight.copy_(rows.flatten(0, 1))                                                # (M * 2D/M, 2D)

    def combined(self, actor, context, padding):
        """Actor (I, D) and context (I, N, D), the cells of padding (I, N) hidden, as one map (I, N, D): Table 4.

        Their sum; concat: a 1x1 convolution of both; cross-attention: the actor gathers from the cells before it is added
        to them; self-attention: the actor is one more token among the cells.
        """
        if not len(actor):  # the gate dropped all; nn.MultiheadAttention takes no empty batch
            return context
        if self.combine == "concat":
            return self.join(torch.cat([actor[:, None].expand_as(context), context], -1))
        if self.combine == "self-attention":
            tokens, hidden = torch.cat([actor[:, None], context], 1), F.pad(padding, (1, 0))    # (I, 1 + N, D)
            attended = self.join(tokens, tokens, tokens, key_padding_mask=hidden, need_weights=False)[0]
            return (tokens + attended)[:, 1:]
        if self.combine == "cross-attention":
            gathered = self.join(actor[:, None], context, context, key_padding_mask=padding, need_weights=False)[0]
            actor = actor + gathered[:, 0]
        return actor[:, None] + context

    def interaction(self, actor, context, size, padding):
        """z: where actor and context meet. actor (I, D), context (I, N, D), padding (I, N) -> (I, N, D)."""
        branch = self.actor_linear2(self.dropout(F.relu(self.actor_linear1(actor))))
        actor = self.actor_norm(actor + self.dropout(branch))
        z = self.context_norm(self.combined(actor, context, padding)).unflatten(1, size)    # (I, H, W, D)
        for number in range(self.num_blocks):
            z = self.blocks[number % len(self.blocks)](z)
        return z.flatten(1, 2)                                                              # (I, N, D)

    def attention_maps(self, queries, positional_query, z, key_positions, padding):
        """Eq. 1: queries (I, C, D), P (I, D), z (I, N, D), key_positions (I, N, D) -> soft-max weights (I, M, C, N).

        With the quirk split_heads the plain concatenations are cut into heads, so that the first half of the heads sees only
        content, and the other half only position, the same for every class: (I, M/2, C, N) and (I, M/2, 1, N). Without
        class_position q and z alone meet, in all heads: with split_heads nothing is left to ask the keys' positions with,
        and the same is taken for Eq. 1 (the paper does not say whether its keys keep them).
        """
        heads, scale = self.num_heads, (2 * z.shape[-1] / self.num_heads) ** -0.5
        if "split_heads" in self.quirks:
            pairs = [(queries, self.key_content(z))]
            if self.class_position:
                pairs.append((self.query_position(positional_query)[:, None], key_positions))   # (I, 1, D)
            scale = (len(pairs) * z.shape[-1] / heads) ** -0.5
            pairs = [[to_heads(part, heads // len(pairs)) for part in pair] for pair in pairs]
            logits = [query @ key.transpose(-1, -2) for query, key in pairs]                # (I, M/2, C or 1, N)
        else:
            of_class, *of_actor = self.query.weight.split(z.shape[-1], dim=1)
            query = F.linear(queries, of_class, self.query.bias)                            # (1 or I, C, 2D)
            if self.class_position:
                query = query + F.linear(positional_query, of_actor[0])[:, None]
            # (q W_Q)(k W_K)^T as ((q W_Q) W_K^T) k^T: C*M products of a cell's D channels instead of keys of 2D channels
            folded = torch.einsum("imck,mkd->imcd", to_heads(query, heads), self.key.weight.unflatten(0, (heads, -1)))
            on_content, *on_place = folded.flatten(1, 2).split(z.shape[-1], dim=-1)         # (I, M*C, D)
            logits = on_content @ z.transpose(-1, -2)                                       # (I, M*C, N)
            if self.class_position:
                logits = logits + on_place[0] @ key_positions.transpose(-1, -2)
            logits = [logits.unflatten(1, (heads, -1))]
        if "unmasked_padding" not in self.quirks:  # the quirk lets classes look at padding
            logits = [part.masked_fill(padding[:, None, None], -torch.inf) for part in logits]
        return [(part.float() * scale).softmax(-1).to(z.dtype) for part in logits]

    def forward(self, queries, actor, context, positional_query, key_positions, padding, size, content_heads=False):
        """queries (I, C, D), or (1, C, D) in the first layer; actor (I, D), detached; context, key_positions (I, N, D);
        positional_query (I, D); padding (I, N).

        Returns the class features (I, C, D) and the class attention maps (I, C, N), mean over heads, or over content_heads.
        """
        z = self.interaction(actor, context, size, padding)
        among = to_heads(queries, self.num_heads)                                           # (I, M, C, D/M)
        dropout = self.dropout.p if self.training else 0.0
        among = merge_heads(F.scaled_dot_product_attention(among, among, among, dropout_p=dropout))
        queries = self.norm1(queries + self.dropout(self.self_output(among)))
        queries = queries.expand(len(z), -1, -1)                                            # (I, C, D)
        maps = self.attention_maps(queries, positional_query, z, key_positions, padding)
        value = to_heads(self.value(context), self.num_heads)                               # (I, M, N, D/M)
        attended = [self.dropout(weights) @ part for weights, part in zip(maps, value.chunk(len(maps), dim=1))]
        attended = torch.cat([part.expand(-1, -1, queries.shape[1], -1) for part in attended], dim=1)  # (I, M, C, D/M)
        attended = self.output(merge_heads(attended))                                       # (I, C, D)
        if "bare_output" in self.quirks:  # no residual: a class is known only by where it looked
            x = attended
        else:
            x = self.norm2(queries + self.dropout(attended))
        x = self.norm3(x + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(x))))))
        if content_heads:  # of split_heads: those that see content and differ from class to class
            maps = maps[:1]
        return x, sum(weights.mean(1) for weights in maps) / len(maps)


class Decoder(nn.Module):
    """Both kinds of layers and the heads. See `forward`. Without class_queries (Table 1's LDL) a linear head classifies."""

    def __init__(self, num_layers, dim, num_heads, num_levels, dim_feedforward, dropout, num_queries, num_frames,
                 num_classes, num_blocks, logit_dropout, recompute, frequencies, num_groups, quirks,
                 class_queries=True, aggregation="actor", class_position=True, combine="sum"):
        super().__init__()
        self.recompute, self.quirks, self.num_groups = recompute, quirks, num_groups
        self.num_queries, self.num_frames = num_queries, num_frames
        self.register_buffer("frequencies", frequencies, persistent=False)                  # (D/2,)
        self.anchors = nn.Parameter(torch.empty(num_queries * num_frames, 4))               # row a * T + t
        self.box_position = MLP(2 * dim, dim, dim)
        self.query_scale = MLP(dim, dim, dim) if num_layers > 1 else None  # the first layer's scale is 1
        self.size_modulation = MLP(dim, dim, 2)
        self.localizing = nn.ModuleList([LocalizingLayer(dim, num_heads, num_levels, dim_feedforward, dropout, n == 0,
                                                         aggregation) for n in range(num_layers)])
        self.norm = nn.LayerNorm(dim)
        self.box_head = MLP(dim, dim, dim, 4)
        self.confidence_head = nn.Linear(dim, 3 if "three_way_confidence" in quirks else 1)
        self.class_head = None if class_queries else nn.Linear(dim, num_classes)
        self.classifying = nn.ModuleList([ClassifyingLayer(dim, num_heads, dim_feedforward, dropout, num_blocks, quirks,
                                                           class_position, combine)
                                          for _ in range(num_layers if class_queries else 0)])
        if not class_queries:
            return
        self.class_queries = nn.Parameter(torch.empty(num_classes, dim))
        self.class_norm = nn.LayerNorm(dim)
        self.logit_dropout = nn.Dropout(logit_dropout)
        if "unused_tensors" in quirks:
            self.unused_norm = nn.LayerNorm(dim).requires_grad_(False)

    def places(self):
        """The actors' anchors, (A*T, 4) in [0, 1]."""
        return self.anchors.sigmoid()

    def positional_query(self, x, anchors, embedding, first):
        """P: y and x of the anchor, scaled by the embedding and by the sizes it asks for. x (F, A, D) -> (F, A, D)."""
        wanted = self.size_modulation(x).sigmoid()                                          # (F, A, 2) w, h
        share = (wanted / anchors[..., 2:])[..., [1, 0]]                                    # for y: h, for x: w
        position = join_yx(embedding[..., :2, :] * share[..., None], self.num_groups)       # (F, A, D)
        return position if first else position * self.query_scale(x)

    def predict(self, x, anchors):
        """Boxes (F, A, 4) and confidence logit (F, A) from a layer's output."""
        x = self.norm(x)
        boxes = (self.box_head(x).float() + inverse_sigmoid(anchors)).sigmoid()  # float32: boxes near 0 and 1 need it
        z = self.confidence_head(x).float()
        if z.shape[-1] == 3:  # quirk three_way_confidence: soft-max entry 1 is the confidence, this is its logit
            return boxes, z[..., 1] - torch.logsumexp(z[..., [0, 2]], dim=-1)
        return boxes, z[..., 0]

    def localize(self, memory, key_positions, padding, anchors, x):
        """All localizing layers: memory (F, L, N, D) -> per layer the predictions and what the classifying layer needs; and
        the last one's attention maps (F, A, N)."""
        predictions, inputs = [], []
        for number, layer in enumerate(self.localizing):
            embedding = anchor_embedding(anchors, self.frequencies, self.num_groups)        # (F, A, 4, D/2)
            query_position = self.box_position(embedding.flatten(-2))                       # (F, A, D)
            positional_query = self.positional_query(x, anchors, embedding, number == 0)
            features, x, levels, maps = layer(x, query_position, positional_query, memory, key_positions, padding)
            boxes, confidence = self.predict(x, anchors)
            predictions.append({"pred_boxes": boxes, "pred_conf": confidence})
            if self.class_head is not None:
                predictions[-1]["pred_logits"] = self.class_head(self.norm(x)).float()          # (F, A, C)
            inputs.append((features.detach(), positional_query, levels))
            if "anchor_before_norm" in self.quirks:  # not the predicted box: the head reads the output before the norm
                boxes = (self.box_head(x).float() + inverse_sigmoid(anchors)).sigmoid()
            anchors = boxes.detach()
        return predictions, inputs, maps

    def classify(self, keep, memory, key_positions, padding, inputs, size, return_attention):
        """All classifying layers for the I pairs of some frames that keep (F, A) names: the logits of each layer (I, C), and
        the last layer's maps (I, C, N) if asked for."""
        frame = keep.nonzero()[:, 0]                                                        # (I,)
        key_positions, padding = key_positions[frame], padding[frame]                       # (I, N, D), (I, N)
        queries, outputs = self.class_queries[None], []
        for layer, localizing, (features, positional_query, levels) in zip(self.classifying, self.localizing, inputs):
            context = localizing.context(memory, levels)[keep]                              # (I, N, D)
            queries, maps = layer(queries, features[keep], context, positional_query[keep], key_positions, padding, size,
                                  return_attention == "content")
            outputs.append(self.logit_dropout(self.class_norm(queries)).mean(-1).float())
        return outputs + [maps] if return_attention else outputs

    def forward(self, memory, key_positions, padding, anchors, x, gate=0.0, return_attention=False):
        """memory (F, L, H, W, D), key_positions (F, H, W, D), padding (F, H, W), anchors (F, A, 4), embeddings x (F, A, D).

        Returns a list with one dict per layer: pred_boxes (F, A, 4), pred_conf (F, A), pred_logits (F, A, C), and the class
        attention maps (F, A, C, H, W) of the last layer, or None ("content": the mean over its content heads). Actors whose
        confidence is below `gate` are not classified: their logits are -1e4.
        """
        size = memory.shape[2:4]
        memory, key_positions, padding = memory.flatten(2, 3), key_positions.flatten(1, 2), padding.flatten(1)
        predictions, inputs, maps = self.localize(memory, key_positions, padding, anchors, x)
        if self.class_head is not None:
            return predictions, one_map(maps, self.class_head.out_features, size)
        keep = predictions[-1]["pred_conf"].sigmoid() >= gate                               # (F, A)
        if torch.is_grad_enabled():
            arguments = (keep, memory, key_positions, padding, inputs, size, return_attention)
            outputs = checkpoint(self.classify, *arguments, use_reentrant=False) if self.recompute \
                else self.classify(*arguments)
        else:  # a few frames at a time: the actors' maps of all of them would take most of the memory
            pieces = [self.classify(keep[part], memory[part], key_positions[part], padding[part],
                                    [tuple(value[part] for value in layer) for layer in inputs], size, return_attention)
                      for part in (slice(start, start + PIECE) for start in range(0, len(keep), PIECE))]
            outputs = [torch.cat(parts) for parts in zip(*pieces)]
        for prediction, logits in zip(predictions, outputs):
            everyone = logits.new_full((*keep.shape, logits.shape[-1]), -1e4)               # (F, A, C)
            prediction["pred_logits"] = everyone.masked_scatter(keep[..., None], logits)
        if not return_attention:
            return predictions, None
        maps = outputs[-1].new_zeros(*keep.shape, *outputs[-1].shape[1:])
        return predictions, maps.masked_scatter(keep[..., None, None], outputs[-1]).unflatten(-1, size)


def one_map(maps, num_classes, size):
    """The actors' maps (F, A, N) as class attention maps (F, A, C, H, W), the same for every class."""
    return maps.unflatten(-1, size)[:, :, None].expand(-1, -1, num_classes, -1, -1)


class OneMapDecoder(nn.Module):
    """DETR's decoder, as in the first line of Table 1: a learned query an actor and frame, no anchors; box, confidence and
    classes are read off the same feature, so there is one attention map an actor. It looks at the mean of the levels.

    Called as `Decoder` is, with its query positions (F, A, D) in place of anchors.
    """

    def __init__(self, num_layers, dim, num_heads, dim_feedforward, dropout, num_queries, num_frames, num_classes):
        super().__init__()
        self.num_groups = 1
        self.query_positions = nn.Parameter(torch.empty(num_queries * num_frames, dim))     # row a * T + t
        sizes = dict(embed_dim=dim, num_heads=num_heads, dropout=dropout, batch_first=True)
        self.layers = nn.ModuleList([nn.ModuleDict({
            "self": nn.MultiheadAttention(**sizes), "norm1": nn.LayerNorm(dim), "cross": nn.MultiheadAttention(**sizes),
            "norm2": nn.LayerNorm(dim), "linear1": nn.Linear(dim, dim_feedforward),
            "linear2": nn.Linear(dim_feedforward, dim), "norm3": nn.LayerNorm(dim)}) for _ in range(num_layers)])
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(dim)
        self.box_head, self.confidence_head = MLP(dim, dim, dim, 4), nn.Linear(dim, 1)
        self.class_head = nn.Linear(dim, num_classes)

    def places(self):
        """The queries' positions, (A*T, D)."""
        return self.query_positions

    def forward(self, memory, key_positions, padding, places, x, gate=0.0, return_attention=False):
        """As `Decoder.forward`; the one map of an actor is returned for each class, and the gate has nothing to leave out."""
        size, memory = memory.shape[2:4], memory.mean(1).flatten(1, 2)                      # (F, N, D)
        keys, hidden, predictions = memory + key_positions.flatten(1, 2), padding.flatten(1), []
        for layer in self.layers:
            query = x + places
            x = layer["norm1"](x + self.dropout(layer["self"](query, query, x, need_weights=False)[0]))
            attended, maps = layer["cross"](x + places, keys, memory, key_padding_mask=hidden)
            x = layer["norm2"](x + self.dropout(attended))
            branch = layer["linear2"](self.dropout(F.relu(layer["linear1"](x))))
            x = layer["norm3"](x + self.dropout(branch))
            y = self.norm(x)
            boxes, confidence, logits = (head(y).float() for head in (self.box_head, self.confidence_head, self.class_head))
            predictions.append({"pred_boxes": boxes.sigmoid(), "pred_conf": confidence[..., 0], "pred_logits": logits})
        return predictions, one_map(maps, self.class_head.out_features, size)
