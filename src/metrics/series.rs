//! Metrics with labels whose time series all exist from the start: counting is an addition to an atomic number, found by
//! its place in an array. The crate's own families look labels up in a map behind a lock.

use std::{fmt, marker::PhantomData, sync::Arc};

use prometheus_client::{
    encoding::{EncodeMetric, MetricEncoder},
    metrics::{MetricType, TypedMetric},
};

use super::label::{LabelSet, Labels};

/// One metric for each set of labels.
#[derive(Debug)]
pub(super) struct Series<M>(Arc<[(LabelSet, M)]>);

impl<M> Series<M> {
    pub(super) fn new(series: impl IntoIterator<Item = (LabelSet, M)>) -> Self {
        Self(series.into_iter().collect())
    }
}

impl<M> Clone for Series<M> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<M: EncodeMetric + TypedMetric> EncodeMetric for Series<M> {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> fmt::Result {
        for (labels, metric) in &*self.0 {
            metric.encode(encoder.encode_family(labels)?)?;
        }
        Ok(())
    }

    fn metric_type(&self) -> MetricType {
        M::TYPE
    }
}

/// One metric for each value of `L`.
pub struct By<L, M> {
    series: Series<M>,
    labels: PhantomData<fn(L)>,
}

impl<L: Labels, M: Default> Default for By<L, M> {
    fn default() -> Self {
        let series = (0..L::COUNT).map(|index| {
            let mut labels = LabelSet::new();
            L::at(index).write(&mut labels);
            (labels, M::default())
        });
        Self { series: Series::new(series), labels: PhantomData }
    }
}

impl<L: Labels, M> By<L, M> {
    /// The metric of these labels.
    pub fn of(&self, labels: L) -> &M {
        &self.series.0[labels.index()].1
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = (L, &M)> {
        self.series.0.iter().enumerate().map(|(index, (_, metric))| (L::at(index), metric))
    }

    pub(super) fn series(&self) -> Series<M> {
        self.series.clone()
    }
}

impl<L, M: fmt::Debug> fmt::Debug for By<L, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("By").field(&self.series).finish()
    }
}
