//! The gauges that routers scrape of a model server, in vLLM's spelling: Kubernetes' Gateway API Inference
//! Extension, llm-d and vLLM's own router choose by them who gets a request.

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::gauge::ConstGauge;
use tandem_engine::EngineHandle;

#[derive(Debug, EncodeLabelSet)]
struct ModelLabels {
    model_name: &'static str,
}

#[derive(Debug, EncodeLabelSet)]
struct CacheLabels {
    block_size: u64,
    /// Blocks in all; whatever they lie in.
    num_gpu_blocks: u64,
    enable_prefix_caching: &'static str,
}

/// The pair is one server to them.
const MODEL: ModelLabels = ModelLabels { model_name: "tandem" };

pub(super) struct VllmCollector(pub(super) EngineHandle);

impl std::fmt::Debug for VllmCollector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("VllmCollector")
    }
}

impl Collector for VllmCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let stats = self.0.stats();
        let used = stats.num_total_blocks.saturating_sub(stats.num_free_blocks + stats.num_cached_blocks);
        let usage = used as f64 / stats.num_total_blocks.max(1) as f64;
        for (name, help, value) in [
            ("vllm:num_requests_waiting", "Sequences waiting for room", stats.num_waiting as f64),
            ("vllm:num_requests_running", "Sequences running", stats.num_running as f64),
            ("vllm:kv_cache_usage_perc", "Part of the KV cache that sequences use, 0 to 1", usage),
        ] {
            let gauge = ConstGauge::new(value);
            let mut descriptor = encoder.encode_descriptor(name, help, None, gauge.metric_type())?;
            gauge.encode(descriptor.encode_family(&MODEL)?)?;
        }
        let gauge = ConstGauge::new(1_i64);
        let name = "vllm:cache_config_info";
        let mut descriptor =
            encoder.encode_descriptor(name, "How the KV cache is made", None, gauge.metric_type())?;
        let labels = CacheLabels {
            block_size: self.0.block_size() as u64,
            num_gpu_blocks: stats.num_total_blocks,
            enable_prefix_caching: "True",
        };
        gauge.encode(descriptor.encode_family(&labels)?)
    }
}
