//! What is found out about a part of a row of logits, chunk by chunk, and what comes of all parts together: the one way
//! from logits to a token, whether the row lies in memory or goes by in the output head.

use super::candidates::{Likely, Token, factor};
use super::choice::{Best, Choice, Chosen, Mass, Race, Report};
use super::{look_at, mass};
use crate::dispatch::Kernels;
use crate::math::double::ln;

/// Sums of a chunk of a row, as far as its [`Choice`] asks for them.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Masses {
    /// Of the bare logits.
    bare: Mass,
    /// Of those that the token is chosen of.
    own: Mass,
    /// Of the latter over the temperature.
    tempered: Mass,
}

impl Choice {
    /// True if [`Masses`] are wanted of a row.
    pub(crate) fn sums(&self) -> bool {
        self.share || self.report.is_some() || self.sums_tempered()
    }

    fn sums_tempered(&self) -> bool {
        self.keep.top_k == 0 && self.keep.top_p < 1.0 && self.race.is_some()
    }

    /// True if more is to be done with what parts have found than to take the best.
    pub(crate) fn is_joined(&self) -> bool {
        self.kept_race().is_some() || self.report.is_some_and(|num_top| num_top > 0)
    }
}

/// What all parts of a row have kept; buffers that are used again and again.
#[derive(Clone, Debug, Default)]
pub(crate) struct Joined {
    /// Who runs, where that is not all.
    runners: Likely,
    /// The likeliest of the bare logits.
    top: Likely,
}

impl Joined {
    fn join(&mut self, parts: &[Part]) {
        self.runners.clear();
        self.top.clear();
        for part in parts {
            self.runners.join(&part.runners);
            self.top.join(&part.top);
        }
    }

    /// The likeliest tokens, as they are to be reported, and their bare logits.
    pub(crate) fn top(&self, chosen: &Chosen) -> &[Token] {
        self.top.first(chosen.report.map_or(0, |report| report.num_top as usize))
    }
}

/// What was found out about a part of a row. (Aligned, so that threads share no line of theirs.)
#[derive(Clone, Debug)]
#[repr(align(64))]
pub(crate) struct Part {
    best: Best,
    is_finite: bool,
    /// Who may run, where that is not all.
    runners: Likely,
    /// The likeliest of the bare logits.
    top: Likely,
    /// Bare logits that were changed, of a row that reports.
    bare: Vec<Token>,
}

impl Default for Part {
    fn default() -> Self {
        let (runners, top, bare) = Default::default();
        let mut part = Part { best: Best::NONE, is_finite: true, runners, top, bare };
        part.clear();
        part
    }
}

impl Part {
    /// Before anything was looked at.
    pub(crate) fn clear(&mut self) {
        (self.best, self.is_finite) = (Best::NONE, true);
        self.runners.clear();
        self.top.clear();
        self.bare.clear();
    }

    /// Looks at the logits from `first` on, a chunk of a row of `num_tokens`, and changes them as `choice` has it.
    /// Gives what of the chunk is summed.
    pub(crate) fn look(
        &mut self,
        kernels: &Kernels,
        choice: &Choice,
        (first, num_tokens): (u32, usize),
        logits: &mut [f32],
    ) -> Masses {
        let mut sums = Masses::default();
        if let Some(num_top) = choice.report {
            sums.bare = mass(kernels, logits, 1.0);
            self.top.look_for_top(kernels, first, logits, num_top as usize);
        }
        if choice.changes_logits() {
            // SAFETY: a table is of an available instruction set; any length will do.
            self.is_finite &= unsafe { (kernels.all_finite)(logits) };
            choice.change(kernels, first, logits, choice.report.map(|_| &mut self.bare));
        }
        match choice.kept_race() {
            None => look_at(kernels, logits, first, choice.race.as_ref(), &mut self.best),
            Some(race) => {
                sums.tempered = self.look_for_runners(kernels, (choice, race), (first, num_tokens), logits);
            }
        }
        if choice.changes_logits() {
            // What is masked is infinite, and no fault of the row's.
            self.best.is_finite = true;
        }
        if choice.share {
            sums.own = mass(kernels, logits, 1.0);
        }
        sums
    }

    /// Gives the sum of the logits over the temperature, if top-p is a share of all of them.
    fn look_for_runners(
        &mut self,
        kernels: &Kernels,
        (choice, race): (&Choice, &Race),
        (first, num_tokens): (u32, usize),
        logits: &[f32],
    ) -> Mass {
        let (keep, inverse_temperature) = (&choice.keep, race.inverse_temperature);
        let mut greatest = Best::NONE;
        look_at(kernels, logits, first, None, &mut greatest);
        self.best.is_finite &= greatest.is_finite;
        if keep.top_k > 0 {
            self.runners.look_for_top(kernels, first, logits, keep.top_k as usize);
            return Mass::default();
        }
        let mass = match choice.sums_tempered() {
            true => mass(kernels, logits, factor(inverse_temperature)),
            false => Mass { max: greatest.logit, sum: 0.0 },
        };
        self.runners.look_for_share(kernels, (first, logits), mass, (keep, inverse_temperature), num_tokens);
        mass
    }

    /// What the row of `num_tokens` gives of which these are all parts, in any order; `masses` is of all its chunks
    /// in order. The likeliest tokens to report are in [`Joined::top`] afterwards.
    pub(crate) fn choose(
        parts: &[Part],
        choice: &Choice,
        masses: &[Masses],
        num_tokens: usize,
        joined: &mut Joined,
    ) -> Chosen {
        let is_finite = parts.iter().all(|part| part.is_finite && part.best.is_finite);
        if !is_finite {
            return Chosen::default();
        }
        joined.join(parts);
        let mut best = parts.iter().fold(Best::NONE, |best, part| best.or(part.best));
        if let Some(race) = choice.kept_race() {
            let of = factor(race.inverse_temperature);
            let (_, total) = Mass::total(masses.iter().map(|masses| masses.tempered), of);
            let runners = joined.runners.kept(&choice.keep, race.inverse_temperature, total, num_tokens);
            best = race.winner(runners.iter().copied());
        }
        let Best { id: token, logit, .. } = best;
        let share = if choice.share && logit > f32::NEG_INFINITY {
            let (max, total) = Mass::total(masses.iter().map(|masses| masses.own), 1.0);
            (f64::from(crate::math::exp(logit - max)) / total) as f32
        } else {
            0.0
        };
        let report = choice.report.map(|num_top| {
            let (max, total) = Mass::total(masses.iter().map(|masses| masses.bare), 1.0);
            let num_top = joined.top.sort(num_top as usize) as u32;
            let bare = parts.iter().flat_map(|part| &part.bare).find(|bare| bare.0 == token);
            let logit = bare.filter(|_| logit > f32::NEG_INFINITY).map_or(logit, |bare| bare.1);
            Report { logit, log_sum: f64::from(max) + ln(total), num_top }
        });
        Chosen { token, share, is_finite, report }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::choice::{Change, Keep, SHARE_CHUNK};
    use super::super::noise::Noise;
    use super::*;
    use crate::dispatch;
    use crate::isa::Isa;

    /// The likeliest first, of equals the first; both zeros are equal.
    fn textbook_rank(a: &(u32, f32), b: &(u32, f32)) -> std::cmp::Ordering {
        (b.1 + 0.0).total_cmp(&(a.1 + 0.0)).then(a.0.cmp(&b.0))
    }

    /// The textbook's candidates, likeliest first: every token is sorted, nothing is passed over. (Where a nucleus
    /// ends to the last bit is a matter of sums: its total is the row's.)
    fn kept(row: &[f32], keep: &Keep, inverse_temperature: f64, total: f64) -> Vec<u32> {
        let mut tokens: Vec<(u32, f32)> =
            (0..).zip(row.iter().copied()).filter(|token| token.1 > f32::NEG_INFINITY).collect();
        let weight =
            |max: f32, logit: f32| crate::math::double::exp(f64::from(logit - max) * inverse_temperature);
        tokens.sort_by(textbook_rank);
        let Some(&(_, max)) = tokens.first() else { return Vec::new() };
        let mut total = total;
        if keep.top_k > 0 {
            tokens.truncate(keep.top_k as usize);
            let mut ids = tokens.clone();
            ids.sort_by_key(|token| token.0);
            total = ids.iter().map(|token| weight(max, token.1)).sum();
        }
        if keep.top_p < 1.0 {
            let mut sum = 0.0;
            let last = tokens.iter().position(|token| {
                sum += weight(max, token.1);
                sum >= f64::from(keep.top_p) * total
            });
            tokens.truncate(last.map_or(tokens.len(), |last| last + 1));
        }
        let floor = f64::from(keep.min_p);
        let num_likely = tokens.iter().take_while(|token| weight(max, token.1) >= floor).count();
        tokens.truncate(num_likely.max(1));
        tokens.into_iter().map(|token| token.0).collect()
    }

    /// Flat, peaked and stepped rows of many chunks and of less than one.
    fn rows() -> impl Iterator<Item = Vec<f32>> {
        (0..60u32).map(|seed| {
            let noise = Noise::new(3, seed.into());
            let spread = [0.0f32, 0.3, 2.0, 9.0, 40.0][seed as usize % 5];
            let len = [1, 31, 512, 513, 3000, 9000][seed as usize % 6];
            let value = |id| match seed % 4 {
                0 => spread * noise.complement(id) as f32,
                1 => spread * noise.complement(id / 3) as f32,
                2 => spread * (noise.complement(id) as f32).powi(9),
                _ => spread * (8.0 * noise.complement(id) as f32).floor(),
            };
            (0..len).map(value).collect()
        })
    }

    fn choices(seed: u32, len: usize) -> Vec<Choice> {
        let noise = Noise::new(seed.into(), 1);
        let keeps = [
            (0, 0.95, 0.0),
            (0, 0.3, 0.0),
            (20, 1.0, 0.0),
            (20, 0.8, 0.0),
            (1, 1.0, 0.0),
            (0, 1.0, 0.05),
            (700, 0.999, 0.01),
            (0, 0.9, 0.3),
            (0, 1e-30, 0.0),
            (0, 1.0, 1.0),
            (u32::MAX, 1.0, 0.0),
        ];
        let temperatures = [1e-38, 0.2, 1.0, 100.0];
        let mask: Vec<u32> =
            (0..len.div_ceil(32) as u32).map(|word| noise.complement(word).to_bits() as u32).collect();
        let mask = Arc::new(mask);
        let ids = (0..len as u32 + 9).filter(|id| noise.complement(*id) < 0.01);
        let changes =
            ids.map(|id| Change { bias: 9.0, less: 1.0, repetition: 1.3, is_forbidden: id % 7 == 1, id });
        let changes = Arc::new(changes.collect::<Vec<_>>());
        let of = |(i, &(top_k, top_p, min_p)): (usize, &(u32, f32, f32))| {
            let race = Race { noise, inverse_temperature: 1.0 / temperatures[(i + seed as usize) % 4] };
            Choice {
                race: Some(race),
                keep: Keep { top_k, top_p, min_p },
                share: i % 2 == 0,
                report: (i % 3 == 0).then_some(5),
                changes: ((i + seed as usize) % 3 == 1).then(|| Arc::clone(&changes)),
                mask: ((i + seed as usize) % 5 == 2).then(|| Arc::clone(&mask)),
            }
        };
        keeps.iter().enumerate().map(of).collect()
    }

    /// What the row gives if its chunks are shared out among so many parts, and who ran.
    fn look(
        isa: Isa,
        row: &[f32],
        choice: &Choice,
        num_parts: usize,
    ) -> (Chosen, Vec<u32>, Vec<(u32, f32)>, f64) {
        let mut parts = vec![Part::default(); num_parts];
        let mut masses = Vec::new();
        for (index, chunk) in row.chunks(SHARE_CHUNK).enumerate() {
            let (part, first) = (&mut parts[index % num_parts], (index * SHARE_CHUNK) as u32);
            masses.push(part.look(dispatch::kernels(isa), choice, (first, row.len()), &mut chunk.to_vec()));
        }
        let mut joined = Joined::default();
        let chosen = Part::choose(&parts, choice, &masses, row.len(), &mut joined);
        let of = factor(choice.race.as_ref().map_or(1.0, |race| race.inverse_temperature));
        let total = Mass::total(masses.iter().map(|masses| masses.tempered), of).1;
        let num = joined.runners.len();
        let runners = joined.runners.first(num).iter().map(|token| token.0).collect();
        (chosen, runners, joined.top(&chosen).to_vec(), total)
    }

    #[test]
    fn whoever_looks_and_however_a_row_is_cut_the_textbooks_candidates_run() {
        for (seed, row) in (0..).zip(rows()) {
            for choice in choices(seed, row.len()) {
                let (chosen, _, top, total) = look(Isa::Scalar, &row, &choice, 1);
                let mut changed = row.clone();
                choice.change(dispatch::kernels(Isa::Scalar), 0, &mut changed, None);
                let race = choice.race.unwrap();
                let expected = kept(&changed, &choice.keep, race.inverse_temperature, total);
                let winner = race.winner(expected.iter().map(|&id| (id, changed[id as usize])));
                assert_eq!(chosen.token, winner.id, "{choice:?}");
                let mut ranked: Vec<(u32, f32)> = (0..).zip(row.iter().copied()).collect();
                ranked.sort_by(textbook_rank);
                ranked.truncate(choice.report.map_or(0, |num_top| num_top as usize));
                assert_eq!(top, ranked, "{choice:?}");
                for isa in Isa::available() {
                    for num_parts in [1, 2, 5] {
                        let got = look(isa, &row, &choice, num_parts);
                        assert_eq!(
                            got,
                            (chosen, expected.clone(), top.clone(), total),
                            "{isa} {num_parts} {choice:?}"
                        );
                    }
                }
            }
        }
    }
}
