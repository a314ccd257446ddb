//! How many tokens of prompts a pass may have, so that nobody has to wait for longer than a moment.
//!
//! A token costs more the more of its context its layers attend to. What that is worth is measured once
//! ([`crate::profile`]); how much they attend to, a model's windows say: where all layers slide, a chunk far into a
//! text is as long as one at the end of its first window.

use tandem_models::DecoderConfig;

/// Tokens of prompts in a pass, however much is verified in it and however long the context.
const MIN_PREFILL_TOKENS: usize = 16;

/// Windows of one model that are told apart.
const MOST_WINDOWS: usize = 4;

/// How much of a context a model's layers attend to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Reach {
    /// Tokens that layers see, and what share of all layers those are.
    windows: [(usize, f64); MOST_WINDOWS],
}

impl Default for Reach {
    /// All of it.
    fn default() -> Self {
        let mut windows = [(usize::MAX, 0.0); MOST_WINDOWS];
        windows[0].1 = 1.0;
        Reach { windows }
    }
}

impl Reach {
    pub(crate) fn of(config: &DecoderConfig) -> Self {
        let mut reach = Reach { windows: [(usize::MAX, 0.0); MOST_WINDOWS] };
        for layer in 0..config.num_layers {
            let window = config.layer(layer).window.unwrap_or(usize::MAX);
            // The first is for layers that see all, and for windows of more kinds than there are places.
            let places = &mut reach.windows;
            let known = places.iter().position(|&(w, share)| w == window && (share > 0.0 || w == usize::MAX));
            let place =
                known.or_else(|| (1..MOST_WINDOWS).find(|&place| places[place].1 == 0.0)).unwrap_or(0);
            let seen = if place == 0 { usize::MAX } else { window };
            places[place] = (seen, places[place].1 + 1.0 / config.num_layers as f64);
        }
        reach
    }

    /// Tokens of `context` that a layer attends to, on average.
    pub(crate) fn tokens(&self, context: usize) -> f64 {
        self.windows.iter().map(|&(window, share)| share * window.min(context) as f64).sum()
    }
}

/// The tokens of prompts that a pass may have.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct PrefillLimit {
    /// At the beginning of a prompt.
    pub(crate) num_tokens: usize,
    /// How much dearer than there a token is for each token of context that it attends to, as a share of its cost.
    pub(crate) context_cost: f64,
    /// How many of them that is.
    pub(crate) reach: Reach,
}

impl PrefillLimit {
    /// So many, wherever they stand.
    pub(crate) fn flat(num_tokens: usize) -> Self {
        PrefillLimit { num_tokens, context_cost: 0.0, reach: Reach::default() }
    }

    /// A token's cost after `context` others, in tokens at the beginning of a prompt.
    fn cost(&self, context: usize) -> f64 {
        1.0 + self.context_cost * self.reach.tokens(context)
    }

    /// What a pass has for prompts that decodes `num_tokens` too: never nothing.
    pub(crate) fn beside(&self, num_tokens: usize) -> usize {
        self.num_tokens.saturating_sub(num_tokens).max(self.num_tokens.min(MIN_PREFILL_TOKENS))
    }

    /// Tokens after `context` others that cost as much as `budget` at the beginning of a prompt; never fewer than
    /// sixteen of them, whatever those cost.
    pub(crate) fn tokens(&self, budget: usize, context: usize) -> usize {
        ((budget as f64 / self.cost(context)) as usize).max(budget.min(MIN_PREFILL_TOKENS))
    }

    /// What is left of `budget` after so many tokens.
    pub(crate) fn rest(&self, budget: usize, num_tokens: usize, context: usize) -> usize {
        budget.saturating_sub((num_tokens as f64 * self.cost(context)).ceil() as usize)
    }
}

#[cfg(test)]
mod tests {
    use tandem_models::LayerConfig;

    use super::*;

    #[test]
    fn a_chunk_shrinks_with_the_context_before_it() {
        let limit = PrefillLimit { context_cost: 0.001, ..PrefillLimit::flat(80) };
        assert_eq!(limit.tokens(80, 0), 80);
        assert_eq!(limit.tokens(80, 1_000), 40);
        assert_eq!(limit.tokens(80, 100_000), MIN_PREFILL_TOKENS);
        assert_eq!((limit.tokens(10, 100_000), limit.tokens(0, 5)), (10, 0), "no more than is left");
        assert_eq!(
            (limit.rest(80, 30, 1_000), limit.rest(80, 40, 1_000), limit.rest(80, 80, 1_000)),
            (20, 0, 0)
        );
        assert_eq!((limit.beside(20), limit.beside(75), limit.beside(500)), (60, 16, 16));
        let flat = PrefillLimit::flat(80);
        assert_eq!((flat.tokens(80, 1 << 20), flat.rest(80, 30, 1 << 20)), (80, 50));
    }

    #[test]
    fn layers_attend_to_no_more_than_their_windows_show() {
        let config = |windows: &[Option<usize>]| DecoderConfig {
            num_layers: windows.len(),
            layers: windows.iter().map(|&window| LayerConfig { window, ..LayerConfig::default() }).collect(),
            ..DecoderConfig::default()
        };
        let mixed = Reach::of(&config(&[Some(512), Some(512), Some(512), None]));
        assert_eq!((mixed.tokens(100), mixed.tokens(512)), (100.0, 512.0));
        assert_eq!(mixed.tokens(4_096), 0.75 * 512.0 + 0.25 * 4_096.0);
        let sliding = Reach::of(&config(&[Some(512), Some(512)]));
        assert_eq!(sliding.tokens(1 << 20), 512.0);
        let limit = PrefillLimit { context_cost: 0.001, reach: sliding, ..PrefillLimit::flat(80) };
        assert_eq!(limit.tokens(80, 512), limit.tokens(80, 1 << 20));
        let whole = Reach::of(&DecoderConfig { num_layers: 3, ..DecoderConfig::default() });
        assert!((whole.tokens(1_000) - 1_000.0).abs() < 1e-6);
        // More kinds than are told apart count as layers that see all.
        let many = Reach::of(&config(&[Some(1), Some(2), Some(3), Some(4), Some(5)]));
        assert!((many.tokens(100) - (6.0 + 200.0) / 5.0).abs() < 1e-6);
    }
}
