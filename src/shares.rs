//! Each user's share of what there is not enough of for everybody at once, so that none can take it all.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError, Weak},
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::user::UserName;

/// A number of permits for each user.
#[derive(Debug)]
pub struct Shares {
    each: usize,
    by_user: Mutex<HashMap<UserName, Weak<Semaphore>>>,
}

impl Shares {
    /// `each`: permits of one user.
    pub fn new(each: usize) -> Self {
        Self { each, by_user: Mutex::default() }
    }

    /// Waits for one of the user's permits.
    pub async fn take(&self, user: &UserName) -> Option<OwnedSemaphorePermit> {
        self.of(user).acquire_owned().await.ok()
    }

    fn of(&self, user: &UserName) -> Arc<Semaphore> {
        let mut by_user = self.by_user.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(semaphore) = by_user.get(user).and_then(Weak::upgrade) {
            return semaphore;
        }
        // Only users with something under way are kept.
        by_user.retain(|_, semaphore| semaphore.strong_count() > 0);
        let semaphore = Arc::new(Semaphore::new(self.each));
        by_user.insert(user.clone(), Arc::downgrade(&semaphore));
        semaphore
    }
}
