//! The rotary part of a `config.json`: `rope_theta` and `rope_scaling`, or all in `rope_parameters` as
//! transformers 5 writes it. Source: transformers, `modeling_rope_utils.py`.

use super::options::{MAX_POSITIONS, Options};
use crate::rope::{longrope_attention_factor, yarn_attention_factor};
use crate::{ModelError, Rope, RopeScaling};

const DEFAULT_THETA: f32 = 10_000.0;
const KINDS: &str = "\"default\", \"linear\", \"dynamic\", \"llama3\", \"yarn\" or \"longrope\"";

impl<'a> Options<'a> {
    /// The rotary embedding, and the longest context that it is made for, where `stated` is what the
    /// file says of the latter.
    pub(super) fn rope(&self, head_dim: usize, stated: usize) -> Result<(Rope, usize), ModelError> {
        match self.rope_object()? {
            None => self.rope_in(None, head_dim, stated),
            Some(rope) => self.rope_in(Some(&rope), head_dim, stated),
        }
    }

    /// The object that describes the rotary embedding. As in transformers, `rope_scaling` wins where a
    /// file has both.
    pub(super) fn rope_object(&self) -> Result<Option<Options<'a>>, ModelError> {
        let parameters = self.object("rope_parameters", "rope_parameters.")?;
        Ok(self.object("rope_scaling", "rope_scaling.")?.or(parameters))
    }

    /// As [`Options::rope`], described by `rope` where there is one.
    pub(super) fn rope_in(
        &self,
        rope: Option<&Options<'a>>,
        head_dim: usize,
        stated: usize,
    ) -> Result<(Rope, usize), ModelError> {
        let outer_theta = self.positive("rope_theta", Some(DEFAULT_THETA))?;
        let outer_share = self.positive("partial_rotary_factor", Some(1.0))?;
        let (theta, share) = match rope {
            None => (outer_theta, outer_share),
            Some(rope) => (
                rope.positive("rope_theta", Some(outer_theta))?,
                rope.positive("partial_rotary_factor", Some(outer_share))?,
            ),
        };
        let dim = (head_dim as f32 * share) as usize;
        if dim == 0 || !dim.is_multiple_of(2) || dim > head_dim {
            let wanted = format!("a share of `head_dim`, which is {head_dim}, that is even and not 0");
            return Err(self.error("partial_rotary_factor", wanted));
        }
        let Some(rope) = rope else { return Ok((Rope::plain(dim, theta), stated)) };
        // Files older than transformers 4.45 say `type`; a file with both says the same twice.
        let key = if rope.has("rope_type") { "rope_type" } else { "type" };
        rope.ignore(&["type"]);
        let (scaling, longest) = match rope.string(key)? {
            None if !rope.is_plain() => return Err(rope.error("rope_type", KINDS)),
            None | Some("default") => (RopeScaling::None, stated),
            Some("linear") => (RopeScaling::Linear { factor: rope.positive("factor", None)? }, stated),
            Some("dynamic") => rope.dynamic(dim, stated)?,
            Some("llama3") => (rope.llama3(stated)?, stated),
            Some("yarn") => rope.yarn(stated)?,
            Some("longrope" | "su") => (self.longrope(rope, dim, stated)?, stated),
            Some(_) => return Err(rope.error(key, KINDS)),
        };
        rope.refuse_unread()?;
        Ok((Rope { dim, theta, scaling, interleaved: false }, longest))
    }

    fn dynamic(&self, dim: usize, stated: usize) -> Result<(RopeScaling, usize), ModelError> {
        if dim < 4 {
            return Err(self.error("rope_type", "another: dynamic scaling needs 4 rotary channels or more"));
        }
        let original = self.size("original_max_position_embeddings", Some(stated), MAX_POSITIONS)?;
        let factor = self.positive("factor", None)?;
        if factor < 1.0 {
            return Err(self.error("factor", "at least 1"));
        }
        Ok((RopeScaling::DynamicNtk { factor }, stretched(original, factor)))
    }

    fn llama3(&self, stated: usize) -> Result<RopeScaling, ModelError> {
        let low_freq_factor = self.positive("low_freq_factor", None)?;
        let high_freq_factor = self.positive("high_freq_factor", None)?;
        if high_freq_factor <= low_freq_factor {
            let wanted = format!("more than `low_freq_factor`, which is {low_freq_factor}");
            return Err(self.error("high_freq_factor", wanted));
        }
        Ok(RopeScaling::Llama3 {
            factor: self.positive("factor", None)?,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings: self.size(
                "original_max_position_embeddings",
                Some(stated),
                MAX_POSITIONS,
            )?,
        })
    }

    /// A file that switches YaRN on often leaves `max_position_embeddings` at the pretraining's.
    fn yarn(&self, stated: usize) -> Result<(RopeScaling, usize), ModelError> {
        let original = self.size("original_max_position_embeddings", Some(stated), MAX_POSITIONS)?;
        let factor = self.positive("factor", Some(stated as f32 / original as f32))?;
        let mscale = self.number("mscale")?.zip(self.number("mscale_all_dim")?);
        let attention_factor = match self.positive_or_none("attention_factor")? {
            Some(stated) => stated,
            None => yarn_attention_factor(factor, mscale),
        };
        let scaling = RopeScaling::Yarn {
            factor,
            beta_fast: self.positive("beta_fast", Some(32.0))?,
            beta_slow: self.positive("beta_slow", Some(1.0))?,
            truncate: self.bool("truncate", true)?,
            attention_factor,
            original_max_position_embeddings: original,
        };
        Ok((scaling, stated.max(stretched(original, factor))))
    }

    /// `self` is the file, `rope` the object in it.
    fn longrope(&self, rope: &Options<'a>, dim: usize, stated: usize) -> Result<RopeScaling, ModelError> {
        const ORIGINAL: &str = "original_max_position_embeddings";
        // Phi-3 has it beside the object, and there it wins.
        let inner = rope.size(ORIGINAL, Some(stated), MAX_POSITIONS)?;
        let original = self.size(ORIGINAL, Some(inner), MAX_POSITIONS)?;
        let factor = rope.positive("factor", Some(stated as f32 / original as f32))?;
        let attention_factor = match rope.positive_or_none("attention_factor")? {
            Some(stated) => stated,
            None => longrope_attention_factor(factor, original),
        };
        let (short, long) = (rope.positives("short_factor")?, rope.positives("long_factor")?);
        for (key, factors) in [("short_factor", &short), ("long_factor", &long)] {
            if factors.len() != dim / 2 {
                return Err(rope.error(key, format!("{} numbers, not {}", dim / 2, factors.len())));
            }
        }
        Ok(RopeScaling::LongRope { factors: if stated > original { long } else { short }, attention_factor })
    }
}

/// The context of `factor` times `original` tokens.
pub(super) fn stretched(original: usize, factor: f32) -> usize {
    ((original as f64 * f64::from(factor)) as usize).clamp(1, MAX_POSITIONS)
}
