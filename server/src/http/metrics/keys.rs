//! What is used of the keys. Names and numbers, never a key.
//!
//! Whoever shows a key from the settings, which may do everything, sees all keys; one from the file sees itself
//! alone. For the former at most [`MAX_SHOWN`] keys have series of their own, those that were seen first, as long
//! as the server runs; all others are one. So the number of series is bounded, no key moves from one to another,
//! and none shrinks: what a key had used stays in the sum of the others when it is gone.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;

use crate::keys::{Client, KeyUse, Keyring};

/// Keys with series of their own.
const MAX_SHOWN: usize = 256;

/// The label of the others together.
const OTHERS: &str = "others";

/// Which keys have series of their own.
#[derive(Debug, Default)]
pub(super) struct ShownKeys(Mutex<Shown>);

#[derive(Debug, Default)]
struct Shown {
    /// Those that have, by number. A number is not given twice.
    own: BTreeSet<i64>,
    /// The others that there are, as they were seen last.
    others: BTreeMap<i64, KeyUse>,
    /// The sum of the others that are gone.
    gone: Option<KeyUse>,
}

impl Shown {
    /// A row for each that has series, and one for the others.
    fn rows(&mut self, uses: Vec<KeyUse>) -> Vec<(Labels, KeyUse)> {
        let (mut rows, mut others) = (Vec::new(), BTreeMap::new());
        for used in uses {
            if self.own.contains(&used.id) || (self.own.len() < MAX_SHOWN && self.own.insert(used.id)) {
                rows.push((Labels::own(&used), used));
            } else {
                self.others.remove(&used.id);
                others.insert(used.id, used);
            }
        }
        for gone in std::mem::replace(&mut self.others, others).into_values() {
            add(&mut self.gone, gone);
        }
        let mut sum = self.gone.clone();
        self.others.values().for_each(|used| add(&mut sum, used.clone()));
        rows.extend(sum.map(|sum| (Labels::others(), sum)));
        rows
    }
}

/// Counts one more in a sum, which has no budget.
fn add(sum: &mut Option<KeyUse>, used: KeyUse) {
    match sum {
        Some(sum) => sum.add(&used),
        None => *sum = Some(KeyUse { left: [None; 2], ..used }),
    }
}

impl ShownKeys {
    /// The series that a client may see.
    pub(super) fn registry(&self, keys: &Keyring, client: &Client, now: u64) -> Registry {
        let mut uses = keys.uses(now);
        let rows = if client.name().is_some() {
            uses.retain(|used| used.id == client.id());
            uses.into_iter().map(|used| (Labels::own(&used), used)).collect()
        } else {
            self.0.lock().expect("no holder of this lock panics: this is a bug").rows(uses)
        };
        let mut registry = Registry::with_prefix("tandem");
        registry.register_collector(Box::new(KeyCollector(rows)));
        registry
    }
}

#[derive(Clone, Debug, EncodeLabelSet)]
struct Labels {
    /// Its name; empty of those from the settings, which have none.
    key: Arc<str>,
    /// Its number in the file, 0 of those from the settings together, or [`OTHERS`].
    key_id: String,
}

impl Labels {
    fn own(used: &KeyUse) -> Self {
        Labels { key: used.name.as_deref().unwrap_or_default().into(), key_id: used.id.to_string() }
    }

    fn others() -> Self {
        Labels { key: "".into(), key_id: OTHERS.to_owned() }
    }

    fn with(&self, name: &'static str, value: &'static str) -> [(&'static str, String); 3] {
        [("key", self.key.to_string()), ("key_id", self.key_id.clone()), (name, value.to_owned())]
    }
}

#[derive(Debug)]
struct KeyCollector(Vec<(Labels, KeyUse)>);

impl Collector for KeyCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        type Count = fn(&KeyUse) -> u64;
        let counts: [(&str, &str, Count); 2] = [
            ("key_requests", "Requests of a key, ever", |used| used.num_requests),
            ("key_tokens", "Tokens of a key's prompts and answers, ever", |used| used.num_tokens),
        ];
        for (name, help, count) in counts {
            let mut descriptor = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for (labels, used) in &self.0 {
                ConstCounter::new(count(used)).encode(descriptor.encode_family(labels)?)?;
            }
        }
        let help = "Requests refused because a budget was spent, since the start";
        let mut descriptor = encoder.encode_descriptor("key_refusals", help, None, MetricType::Counter)?;
        for (labels, used) in &self.0 {
            for (budget, count) in [("requests", used.num_refused[0]), ("tokens", used.num_refused[1])] {
                let labels = labels.with("budget", budget);
                ConstCounter::new(count).encode(descriptor.encode_family(&labels)?)?;
            }
        }
        let help = "What is left of a key's budget in its present window";
        let mut descriptor = encoder.encode_descriptor("key_budget_left", help, None, MetricType::Gauge)?;
        for (labels, used) in &self.0 {
            for (budget, left) in [("requests", used.left[0]), ("tokens", used.left[1])] {
                let Some(left) = left else { continue };
                let labels = labels.with("budget", budget);
                let left = ConstGauge::new(i64::try_from(left).unwrap_or(i64::MAX));
                left.encode(descriptor.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn used(id: i64, num_requests: u64) -> KeyUse {
        let (num_tokens, num_refused) = (10 * num_requests, [num_requests, 0]);
        KeyUse {
            id,
            name: Some(format!("key {id}")),
            num_requests,
            num_tokens,
            num_refused,
            left: [Some(7); 2],
        }
    }

    #[test]
    fn what_the_others_had_used_stays_when_they_are_gone() {
        let mut shown = Shown::default();
        let first = MAX_SHOWN as i64;
        let all = |others: &[KeyUse]| [(0..first).map(|id| used(id, 1)).collect(), others.to_vec()].concat();
        let mut others = |uses: Vec<KeyUse>| {
            let (labels, row) = shown.rows(uses).pop().expect("rows");
            assert_eq!((labels.key_id.as_str(), &*labels.key, row.left), (OTHERS, "", [None; 2]));
            (row.num_requests, row.num_tokens, row.num_refused)
        };
        assert_eq!(others(all(&[used(first, 2)])), (2, 20, [2, 0]), "one is without a budget too");
        assert_eq!(others(all(&[used(first, 3), used(first + 1, 4)])), (7, 70, [7, 0]));
        assert_eq!(others(all(&[used(first + 1, 5)])), (8, 80, [8, 0]), "one was revoked");
        // Nor does another take the place of one that had series of its own.
        let fewer = all(&[used(first + 1, 5)]).into_iter().skip(1).collect();
        assert_eq!(others(fewer), (8, 80, [8, 0]));
        assert_eq!(others(all(&[])), (8, 80, [8, 0]), "all were");
        assert_eq!(shown.rows(all(&[])).len(), MAX_SHOWN + 1);
    }
}
