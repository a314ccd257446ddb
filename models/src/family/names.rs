//! What checkpoints call their tensors: a table from roles to name patterns, which is all that a file
//! format or a family has to say about it.

/// What a tensor is for. Projections are `[out_features, in_features]`. A projection's bias has its
/// weight's name with `.bias` for `.weight`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// `[vocab_size, hidden_size]`
    Embed,
    /// `[hidden_size]`
    FinalNorm,
    /// `[vocab_size, hidden_size]`; absent from the checkpoint where the head is the embedding.
    LmHead,
    /// `[hidden_size]`: the norm before attention.
    AttnNorm,
    /// `[hidden_size]`: the norm after attention.
    AttnPostNorm,
    /// Query projection.
    Q,
    /// Key projection.
    K,
    /// Value projection.
    V,
    /// Query, key and value projections in one tensor, in this order; wins over the three.
    Qkv,
    /// `[q_rank, hidden_size]`: makes the latents of queries; see [`crate::config::LatentAttention`].
    QDown,
    /// `[q_rank]`: norm of the latents of queries.
    QDownNorm,
    /// `[_, q_rank]`: makes queries of their latents.
    QUp,
    /// `[kv_rank + rope.dim, hidden_size]`: makes the latents of keys and values, and the key that turns.
    KvDown,
    /// `[kv_rank]`: norm of the latents of keys and values.
    KvDownNorm,
    /// `[num_heads * (content_dim + value_dim), kv_rank]`: makes keys and values of their latents; wins over
    /// the next two.
    KvUp,
    /// `[num_heads, kv_rank, content_dim]`: makes keys of their latents, transposed.
    KUp,
    /// `[num_heads, value_dim, kv_rank]`: makes values of their latents.
    VUp,
    /// Norm of the queries.
    QNorm,
    /// Norm of the keys.
    KNorm,
    /// Attention output projection.
    O,
    /// `[num_heads]`: attention sinks.
    Sinks,
    /// `[hidden_size]`: the norm before the feed-forward layer.
    FfnNorm,
    /// `[hidden_size]`: the norm after the feed-forward layer.
    FfnPostNorm,
    /// Gate projection of the feed-forward layer.
    Gate,
    /// Up projection of the feed-forward layer, or the first of two where there is no gate.
    Up,
    /// Gate and up projections in one tensor, in this order; wins over the two.
    GateUp,
    /// Down projection of the feed-forward layer.
    Down,
    /// `[num_experts, hidden_size]`: the router.
    Router,
    /// `[num_experts]`: the bias by which experts are chosen.
    RouterChoiceBias,
    /// The gate projection of the expert that computes every token.
    SharedGate,
    /// The up projection of the expert that computes every token.
    SharedUp,
    /// The down projection of the expert that computes every token.
    SharedDown,
    /// The gate projection of an expert.
    ExpertGate,
    /// The up projection of an expert.
    ExpertUp,
    /// The gate and up projections of an expert in one tensor; wins over the two.
    ExpertGateUp,
    /// The down projection of an expert.
    ExpertDown,
    /// `[hidden_size]`: of a drafting head, the norm of a token's embedding.
    DraftTokenNorm,
    /// `[hidden_size]`: of a drafting head, the norm of the hidden state beside it.
    DraftHiddenNorm,
    /// `[hidden_size, 2 * hidden_size]`: of a drafting head, what makes one of the two.
    DraftInput,
    /// `[hidden_size, layers * target's hidden_size]`: of a drafting head, what makes one of the hidden states of
    /// several layers.
    DraftFeatures,
}

/// Patterns of names: `{layer}` stands for the number of a layer, `{expert}` for that of an expert. An
/// expert's pattern without `{expert}` names one tensor of all experts, `[num_experts, out, in]`.
pub type NameTable = &'static [(Role, &'static str)];

/// What a checkpoint calls its tensors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WeightNames {
    /// Looked up in order: what a family has of its own, then what it shares with others.
    pub tables: Vec<NameTable>,
    /// Before every name.
    pub prefix: &'static str,
    /// How the tensor of all experts' gates and ups, or downs, is laid out.
    pub expert_layout: ExpertLayout,
}

/// How the tensors that hold all experts of a layer are laid out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum ExpertLayout {
    /// `[num_experts, out, in]`; gates, then ups.
    #[default]
    Rows,
    /// `[num_experts, in, out]`; gate and up of a channel side by side; biases named `..._bias`.
    Columns,
    /// As [`ExpertLayout::Columns`], transposed to `[num_experts, out, in]`.
    PairedRows,
}

/// The names that Hugging Face transformers gives to Llama and all that copied it.
pub const HUGGING_FACE: NameTable = &[
    (Role::Embed, "model.embed_tokens.weight"),
    (Role::FinalNorm, "model.norm.weight"),
    (Role::LmHead, "lm_head.weight"),
    (Role::AttnNorm, "model.layers.{layer}.input_layernorm.weight"),
    (Role::Q, "model.layers.{layer}.self_attn.q_proj.weight"),
    (Role::K, "model.layers.{layer}.self_attn.k_proj.weight"),
    (Role::V, "model.layers.{layer}.self_attn.v_proj.weight"),
    (Role::QNorm, "model.layers.{layer}.self_attn.q_norm.weight"),
    (Role::KNorm, "model.layers.{layer}.self_attn.k_norm.weight"),
    (Role::O, "model.layers.{layer}.self_attn.o_proj.weight"),
    (Role::FfnNorm, "model.layers.{layer}.post_attention_layernorm.weight"),
    (Role::Gate, "model.layers.{layer}.mlp.gate_proj.weight"),
    (Role::Up, "model.layers.{layer}.mlp.up_proj.weight"),
    (Role::Down, "model.layers.{layer}.mlp.down_proj.weight"),
];

impl WeightNames {
    /// Exactly the names of `table`.
    pub fn of(table: NameTable) -> Self {
        WeightNames { tables: vec![table], prefix: "", expert_layout: ExpertLayout::Rows }
    }

    /// The names of [`HUGGING_FACE`].
    pub fn hugging_face() -> Self {
        Self::of(HUGGING_FACE)
    }

    /// These names, except where `table` has others.
    #[must_use]
    pub fn with(mut self, table: NameTable) -> Self {
        self.tables.insert(0, table);
        self
    }

    /// True if there is a name for `role`.
    pub fn has(&self, role: Role) -> bool {
        self.pattern(role).is_some()
    }

    /// True if each expert has a tensor of its own for `role`.
    pub fn is_per_expert(&self, role: Role) -> bool {
        self.pattern(role).is_some_and(|pattern| pattern.contains("{expert}"))
    }

    /// The name of a tensor that no layer owns.
    ///
    /// # Panics
    /// If there is none for `role`: configuration and names of a family belong together.
    pub fn global(&self, role: Role) -> String {
        self.expert(role, 0, 0)
    }

    /// The name of a tensor of layer `layer`.
    ///
    /// # Panics
    /// As [`WeightNames::global`].
    pub fn layer(&self, role: Role, layer: usize) -> String {
        self.expert(role, layer, 0)
    }

    /// The name of a tensor of an expert of layer `layer`.
    ///
    /// # Panics
    /// As [`WeightNames::global`].
    pub fn expert(&self, role: Role, layer: usize, expert: usize) -> String {
        let pattern = self.pattern(role).unwrap_or_else(|| {
            panic!("the family's names have no {role:?}, its options need one: this is a bug")
        });
        let name = pattern.replace("{layer}", &layer.to_string()).replace("{expert}", &expert.to_string());
        format!("{}{name}", self.prefix)
    }

    fn pattern(&self, role: Role) -> Option<&'static str> {
        let entries = self.tables.iter().flat_map(|table| table.iter());
        entries.into_iter().find(|(of, _)| *of == role).map(|(_, pattern)| *pattern)
    }

    /// The name of the bias that belongs to `weight`: "x.q_proj.weight" to "x.q_proj.bias".
    pub fn bias(weight: &str) -> String {
        match weight.strip_suffix(".weight") {
            Some(name) => format!("{name}.bias"),
            None => format!("{weight}_bias"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_familys_own_name_wins_and_the_others_stay() {
        let names = WeightNames::hugging_face().with(&[(Role::FfnNorm, "h.{layer}.n.weight")]);
        assert_eq!(names.layer(Role::FfnNorm, 12), "h.12.n.weight");
        assert_eq!(names.layer(Role::Q, 3), "model.layers.3.self_attn.q_proj.weight");
        assert!(!names.has(Role::Sinks) && names.has(Role::LmHead));
    }

    #[test]
    fn experts_and_biases() {
        const TABLE: NameTable = &[
            (Role::ExpertUp, "l.{layer}.e.{expert}.up.weight"),
            (Role::ExpertDown, "l.{layer}.down_exps.weight"),
        ];
        let names = WeightNames::of(TABLE);
        assert_eq!(names.expert(Role::ExpertUp, 1, 20), "l.1.e.20.up.weight");
        assert!(names.is_per_expert(Role::ExpertUp) && !names.is_per_expert(Role::ExpertDown));
        assert_eq!(WeightNames::bias("a.q.weight"), "a.q.bias");
        assert_eq!(WeightNames::bias("experts.down_proj"), "experts.down_proj_bias");
    }
}
