//! Filters that run at this moment. The list has names: it is for the control socket, never for metrics.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use prometheus_client::metrics::gauge::Gauge;

/// A filter that runs.
#[derive(Clone, Debug)]
pub struct RunningFilter {
    /// Whose.
    pub user: String,
    /// `recipient` or `message`.
    pub phase: &'static str,
    /// For which mail.
    pub queue_id: String,
    /// Since when.
    pub started: Instant,
}

/// All of them: no more than `filter.max-processes`.
#[derive(Clone, Debug, Default)]
pub struct Running {
    list: Arc<Mutex<List>>,
    /// How many there are.
    pub count: Gauge,
}

#[derive(Debug, Default)]
struct List {
    next: u64,
    filters: BTreeMap<u64, RunningFilter>,
}

/// Takes the filter off the list when dropped.
#[derive(Debug)]
pub struct Entry {
    running: Running,
    number: u64,
}

impl Running {
    /// Puts a filter on the list for as long as the entry lives.
    pub fn enter(&self, filter: RunningFilter) -> Entry {
        let mut list = self.lock();
        let number = list.next;
        list.next += 1;
        list.filters.insert(number, filter);
        self.count.inc();
        drop(list);
        Entry { running: self.clone(), number }
    }

    /// Those that run now, eldest first.
    pub fn now(&self) -> Vec<RunningFilter> {
        self.lock().filters.values().cloned().collect()
    }

    fn lock(&self) -> MutexGuard<'_, List> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.running.lock().filters.remove(&self.number);
        self.running.count.dec();
    }
}
