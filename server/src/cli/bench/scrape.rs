//! The numbers on a server's `/metrics` page, as far as benchmarks read them.

use std::collections::HashMap;
use std::time::Duration;

use anyhow::{Context as _, bail};

use super::client::Client;

/// One reading of the page: every sample by its name and labels as they are written.
#[derive(Clone, Debug, Default)]
pub(super) struct Scrape(HashMap<String, f64>);

impl Scrape {
    fn parse(page: &str) -> Self {
        let samples = page.lines().filter(|line| !line.starts_with('#')).filter_map(|line| {
            let (name, value) = line.rsplit_once(' ')?;
            Some((name.to_owned(), value.parse().ok()?))
        });
        Scrape(samples.collect())
    }

    /// Reads the page.
    ///
    /// # Errors
    /// If the server has no such page, or it is not Tandem's.
    pub(super) async fn take(client: &mut Client) -> anyhow::Result<Self> {
        let page = client.get("/metrics").await.context("cannot read /metrics")?;
        let scrape = Scrape::parse(&String::from_utf8_lossy(&page));
        if scrape.0.keys().all(|name| !name.starts_with("tandem_")) {
            bail!("/metrics shows none of Tandem's counters");
        }
        Ok(scrape)
    }

    /// The sample `tandem_NAME`, labels included if it has any.
    pub(super) fn get(&self, name: &str) -> Option<f64> {
        self.0.get(&format!("tandem_{name}")).copied()
    }

    fn is_idle(&self) -> bool {
        ["sequences_running", "sequences_waiting"].iter().all(|name| self.get(name) == Some(0.0))
    }

    /// How the blocks of the KV cache are accounted for, once no sequence is left.
    pub(super) fn blocks(&self) -> Option<Blocks> {
        Some(Blocks {
            total: self.get("kv_blocks")? as u64,
            free: self.get("kv_blocks_free")? as u64,
            cached: self.get("kv_blocks_cached").unwrap_or(0.0) as u64,
            running: self.get("sequences_running")? as u64,
            waiting: self.get("sequences_waiting")? as u64,
        })
    }
}

/// The server's account of its KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub(super) struct Blocks {
    pub(super) total: u64,
    pub(super) free: u64,
    pub(super) cached: u64,
    pub(super) running: u64,
    pub(super) waiting: u64,
}

impl Blocks {
    /// True if an idle server has every block back.
    pub(super) fn are_whole(&self) -> bool {
        self.running == 0 && self.waiting == 0 && self.free + self.cached == self.total
    }
}

/// Waits until the server has nothing to do and gives the last reading, idle or not.
///
/// # Errors
/// As [`Scrape::take`].
pub(super) async fn wait_for_idle(client: &mut Client, patience: Duration) -> anyhow::Result<Scrape> {
    let deadline = tokio::time::Instant::now() + patience;
    loop {
        let scrape = Scrape::take(client).await?;
        if scrape.is_idle() || tokio::time::Instant::now() >= deadline {
            return Ok(scrape);
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: &str = "\
# HELP tandem_kv_blocks Blocks of the KV cache.
# TYPE tandem_kv_blocks gauge
tandem_kv_blocks 100
tandem_kv_blocks_free 60
tandem_kv_blocks_cached 40
tandem_sequences_running 0
tandem_sequences_waiting 0
tandem_output_tokens_total{lane=\"deep\"} 1234
# EOF
";

    #[test]
    fn samples_are_found_by_name_and_labels() {
        let scrape = Scrape::parse(PAGE);
        assert_eq!(scrape.get("output_tokens_total{lane=\"deep\"}"), Some(1234.0));
        assert_eq!(scrape.get("no_such"), None);
        assert!(scrape.is_idle() && scrape.blocks().expect("all there").are_whole());
    }

    #[test]
    fn a_missing_block_or_a_sequence_left_over_is_a_leak() {
        let lost = PAGE.replace("cached 40", "cached 39");
        assert!(!Scrape::parse(&lost).blocks().expect("all there").are_whole());
        let running = PAGE.replace("running 0", "running 1");
        assert!(!Scrape::parse(&running).is_idle());
        assert!(!Scrape::parse(&running).blocks().expect("all there").are_whole());
    }
}
