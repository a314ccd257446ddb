//! What is used of the keys. Names and numbers, never a key.
//!
//! Whoever shows a key from the settings, which may do everything, sees all keys; one from the file sees itself
//! alone. At most [`MAX_SHOWN`] keys have series of their own, those that were seen first, as long as the
//! server runs; all others are one. So the number of series is bounded, and none changes whom it counts.

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

/// Which keys have series of their own, by number.
#[derive(Debug, Default)]
pub(super) struct ShownKeys(Mutex<BTreeSet<i64>>);

impl ShownKeys {
    /// The series that a client may see.
    pub(super) fn registry(&self, keys: &Keyring, client: &Client, now: u64) -> Registry {
        let mut uses = keys.uses(now);
        if client.name().is_some() {
            uses.retain(|used| used.id == client.id());
        }
        let mut rows: BTreeMap<Option<i64>, KeyUse> = BTreeMap::new();
        let mut shown = self.0.lock().expect("no holder of this lock panics: this is a bug");
        for used in uses {
            let is_shown = shown.contains(&used.id) || (shown.len() < MAX_SHOWN && shown.insert(used.id));
            match rows.get_mut(&is_shown.then_some(used.id)) {
                Some(row) => row.add(&used),
                None => drop(rows.insert(is_shown.then_some(used.id), used)),
            }
        }
        let rows = rows.into_iter().map(|(id, used)| (Labels::of(id, &used), used)).collect();
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
    fn of(id: Option<i64>, used: &KeyUse) -> Self {
        match id {
            Some(id) => {
                Labels { key: used.name.as_deref().unwrap_or_default().into(), key_id: id.to_string() }
            }
            None => Labels { key: "".into(), key_id: OTHERS.to_owned() },
        }
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
