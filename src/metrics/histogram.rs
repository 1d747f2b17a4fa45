//! Times in buckets. As the crate's histogram, but without its lock, and it can be read: `usermilter status` shows
//! percentiles.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use prometheus_client::{
    encoding::{EncodeMetric, MetricEncoder, NoLabelSet},
    metrics::{MetricType, TypedMetric},
};

/// Upper bounds of the buckets in microseconds: from a look-up in a directory nearby to a filter that is given a minute.
const BOUNDS: [u64; 16] = [
    100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000,
    5_000_000, 15_000_000, 60_000_000,
];

/// How often something took how long.
#[derive(Clone, Debug, Default)]
pub struct Histogram(Arc<Buckets>);

#[derive(Debug, Default)]
struct Buckets {
    /// The last one is for what lies beyond all bounds.
    counts: [AtomicU64; BOUNDS.len() + 1],
    microseconds: AtomicU64,
}

/// What a histogram says, in words for people.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Percentiles {
    /// How many there were.
    pub count: u64,
    /// Seconds, all together.
    pub sum: f64,
    /// The median, in seconds.
    pub p50: f64,
    /// Nine of ten took no longer.
    pub p90: f64,
    /// 99 of a hundred took no longer.
    pub p99: f64,
}

impl Histogram {
    /// Counts one.
    pub fn observe(&self, time: Duration) {
        let microseconds = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let bucket = BOUNDS.iter().position(|bound| microseconds <= *bound).unwrap_or(BOUNDS.len());
        self.0.counts[bucket].fetch_add(1, Relaxed);
        self.0.microseconds.fetch_add(microseconds, Relaxed);
    }

    fn counts(&self) -> [u64; BOUNDS.len() + 1] {
        std::array::from_fn(|bucket| self.0.counts[bucket].load(Relaxed))
    }

    fn sum(&self) -> f64 {
        self.0.microseconds.load(Relaxed) as f64 / 1e6
    }

    /// Percentiles, each supposed to lie in its bucket as if that were evenly filled, as histogram_quantile() of
    /// Prometheus has it.
    pub fn percentiles(&self) -> Percentiles {
        let counts = self.counts();
        let count = counts.iter().sum();
        let at = |part: f64| {
            let wanted = count as f64 * part;
            let (mut below, mut lower) = (0.0, 0.0);
            for (bucket, n) in counts.iter().enumerate().filter(|(_, n)| **n > 0) {
                lower = bucket.checked_sub(1).map_or(0.0, |bucket| BOUNDS[bucket] as f64);
                // Nothing is known of what lies beyond the last bound.
                let upper = BOUNDS.get(bucket).map_or(lower, |bound| *bound as f64);
                let here = *n as f64;
                if below + here >= wanted {
                    return (lower + (upper - lower) * (wanted - below) / here) / 1e6;
                }
                below += here;
            }
            lower / 1e6
        };
        Percentiles { count, sum: self.sum(), p50: at(0.5), p90: at(0.9), p99: at(0.99) }
    }
}

impl TypedMetric for Histogram {
    const TYPE: MetricType = MetricType::Histogram;
}

impl EncodeMetric for Histogram {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> fmt::Result {
        let counts = self.counts();
        let bounds = BOUNDS.iter().map(|bound| *bound as f64 / 1e6).chain([f64::INFINITY]);
        let buckets: Vec<(f64, u64)> = bounds.zip(counts).collect();
        encoder.encode_histogram::<NoLabelSet>(self.sum(), counts.iter().sum(), &buckets, None)
    }

    fn metric_type(&self) -> MetricType {
        Self::TYPE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_lie_in_the_bucket_of_what_was_seen() {
        let histogram = Histogram::default();
        assert_eq!(histogram.percentiles(), Percentiles::default());
        for _ in 0..98 {
            histogram.observe(Duration::from_millis(3));
        }
        histogram.observe(Duration::from_millis(700));
        histogram.observe(Duration::from_secs(3600));
        let seen = histogram.percentiles();
        assert_eq!(seen.count, 100);
        assert!((0.0025..=0.005).contains(&seen.p50) && (0.0025..=0.005).contains(&seen.p90), "{seen:?}");
        assert!((0.5..=1.0).contains(&seen.p99), "{seen:?}");
        assert!((seen.sum - 3600.994).abs() < 0.001, "{seen:?}");
    }
}
